"""sinkhorn over many small matrices, both sides up to 32: which calls its kernels serve, and their arguments in the C ABI.

These kernels hold a matrix in registers for all iterations (one per SIMD lane on the CPU, one per few threads on a GPU), serve
either order and `eps`, and have a backward pass of their own for gradient="unrolled".
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer
from ..._units import LOG2E
from .call import Call, item_stride

MAX_SIDE = 32


class SmallParams(ctypes.Structure):
    """comp_kernels_sinkhorn_small_params of csrc/include/comp_kernels/sinkhorn_small.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "row_marginals", "col_marginals", "u", "v", "plan")),
        *((name, ctypes.c_void_p) for name in ("grad_plan", "grad_u", "grad_v", "grad_scores")),
        *((name, ctypes.c_int64) for name in ("item_stride", "row_marginals_stride", "col_marginals_stride")),
        *((name, ctypes.c_int64) for name in ("num_items", "num_rows", "num_cols", "num_iters", "rows_first")),
        ("factor", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("dtype", ctypes.c_int64),
    ]


LAYOUT = _native.layout(SmallParams)


def serves(call: Call) -> bool:
    return max(call.scores.shape[-2:]) <= MAX_SIDE and call.tol is None and call.group is None


def declines(call: Call) -> str | None:
    """Why kernels cannot serve a call for its `eps`, which those for larger matrices do not know."""
    if call.eps == 0 or serves(call):
        return None
    return f"the kernels serve eps for matrices of at most {MAX_SIDE} x {MAX_SIDE}, got {tuple(call.scores.shape)}"


def contiguous_items(scores: Tensor) -> Tensor:
    """scores [n, K] or [G, n, K] with every matrix contiguous, and one matrix that stands for all where they are expanded."""
    if scores.is_contiguous() or (scores.dim() == 3 and scores[0].is_contiguous()):
        return scores
    return scores.contiguous()


def solve(run: Callable[[str, SmallParams, Tensor], None], call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """P, u and v of a flat call by run("sinkhorn_small", params, scores)."""
    scores = contiguous_items(call.scores)
    plan, u, v = call.new_results()
    run("sinkhorn_small", _params(scores, call, (u.data_ptr(), v.data_ptr(), plan.data_ptr(), 0, 0, 0, 0)), scores)
    return plan, u, v


def gradient(
    run: Callable[[str, SmallParams, Tensor], None],
    call: Call,
    grad_plan: Tensor | None,
    grad_u: Tensor | None,
    grad_v: Tensor | None,
) -> Tensor:
    """Gradient of the scores of a flat call, in their dtype, by run("sinkhorn_small_backward", params, scores).

    grad_plan, grad_u, grad_v: of the loss, contiguous, of the computing dtype, shaped as P, u and v; None: zeros."""
    scores = contiguous_items(call.scores)
    found = torch.empty_like(scores, memory_format=torch.contiguous_format)
    cotangents = (pointer(x) for x in (grad_plan, grad_u, grad_v))
    run("sinkhorn_small_backward", _params(scores, call, (0, 0, 0, *cotangents, found.data_ptr())), scores)
    return found


def _params(scores: Tensor, call: Call, results: tuple[int, ...]) -> SmallParams:
    """results: the addresses from u to grad_scores."""
    *items, rows, cols = scores.shape
    row_marginals, col_marginals = call.row_marginals, call.col_marginals
    packed = LAYOUT.pack(
        scores.data_ptr(),
        *(pointer(row_marginals), pointer(col_marginals)),
        *results,
        scores.stride(0) if items else 0,
        *(item_stride(row_marginals), item_stride(col_marginals)),
        math.prod(items),
        *(rows, cols, call.num_iters, call.order == "rows_cols"),
        *(LOG2E / call.epsilon, call.eps),
        _native.DTYPE_CODES[scores.dtype],
    )
    return SmallParams.from_buffer_copy(packed)
