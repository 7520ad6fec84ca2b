"""sinkhorn through the C ABI, CPU or CUDA library alike: the params struct."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ... import _native
from ..._units import LOG2E
from .call import Call


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
    def of(cls, call: Call, plan: Tensor) -> SolveParams:
        """All but the potentials, on scores [G, n, K]. The tensors must outlive the call."""
        scores, row_marginals, col_marginals, epsilon, num_iters, tol, *_ = call
        items, rows, cols = scores.shape
        item_stride, row_stride, _ = scores.stride()
        return cls(
            scores=scores.data_ptr(),
            row_marginals=row_marginals.data_ptr(),
            col_marginals=col_marginals.data_ptr(),
            plan=plan.data_ptr(),
            item_stride=item_stride,
            row_stride=row_stride,
            row_marginals_stride=rows if row_marginals.dim() == 2 else 0,
            col_marginals_stride=cols if col_marginals.dim() == 2 else 0,
            num_items=items,
            num_rows=rows,
            num_cols=cols,
            num_iters=num_iters,
            factor=LOG2E / epsilon,
            tol=-1.0 if tol is None else tol,
            dtype=_native.DTYPE_CODES[scores.dtype],
        )
