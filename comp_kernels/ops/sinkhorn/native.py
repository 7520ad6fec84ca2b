"""sinkhorn through the C ABI, CPU or CUDA library alike: the params struct."""

from __future__ import annotations

import ctypes
import math

from torch import Tensor

from ... import _native
from ..._native import pointer
from ..._units import LOG2E
from .call import Call, item_stride


class SolveParams(ctypes.Structure):
    """comp_kernels_sinkhorn_params of csrc/include/comp_kernels/sinkhorn.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "row_marginals", "col_marginals", "u", "v", "plan")),
        *((name, ctypes.c_int64) for name in ("item_stride", "row_stride", "row_marginals_stride", "col_marginals_stride")),
        *((name, ctypes.c_int64) for name in ("num_items", "num_rows", "num_cols", "num_iters")),
        ("factor", ctypes.c_double),
        ("tol", ctypes.c_double),
        ("dtype", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, call: Call, plan: Tensor, u: Tensor, v: Tensor) -> SolveParams:
        """Those of a call on scores [n, K] or [G, n, K]. The tensors must outlive the params."""
        scores, row_marginals, col_marginals, epsilon, num_iters, tol, *_ = call
        *items, rows, cols = scores.shape
        packed = LAYOUT.pack(
            scores.data_ptr(),
            *(pointer(row_marginals), pointer(col_marginals)),
            *(u.data_ptr(), v.data_ptr(), plan.data_ptr()),
            *(scores.stride(0) if items else 0, scores.stride(-2)),
            *(item_stride(row_marginals), item_stride(col_marginals)),
            math.prod(items),
            *(rows, cols, num_iters),
            LOG2E / epsilon,
            -1.0 if tol is None else tol,
            _native.DTYPE_CODES[scores.dtype],
        )
        return cls.from_buffer_copy(packed)


LAYOUT = _native.layout(SolveParams)
