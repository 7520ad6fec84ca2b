"""sinkhorn over many small matrices, both sides up to 32: which calls its kernels serve, and their arguments in the C ABI.

These kernels hold a matrix in registers for all iterations (one per SIMD lane on the CPU, one per few threads on a GPU), serve
either order and `eps`, and have a backward pass of their own for gradient="unrolled".
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from torch import Tensor

from ... import _native
from ..._native import pointer
from ..._units import LOG2E
from .call import Call

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


def serves(call: Call) -> bool:
    return max(call.scores.shape[-2:]) <= MAX_SIDE and call.tol is None and call.group is None


def declines(call: Call) -> str | None:
    """Why kernels cannot serve a call for its `eps`, which those for larger matrices do not know."""
    if call.eps == 0 or serves(call):
        return None
    return f"the kernels serve eps for matrices of at most {MAX_SIDE} x {MAX_SIDE}, got {tuple(call.scores.shape)}"


def contiguous_items(scores: Tensor) -> Tensor:
    """scores [G, n, K] with every matrix contiguous, and one matrix that stands for all where they are expanded."""
    return scores if scores.is_contiguous() or scores[0].is_contiguous() else scores.contiguous()


def solve(run: Callable[[str, SmallParams, Tensor], None], call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(P [G, n, K], u [G, n], v [G, K]) of a flat call by run("sinkhorn_small", params, scores)."""
    scores = contiguous_items(call.scores)
    items, rows, cols = scores.shape
    plan = scores.new_empty(scores.shape, dtype=call.row_marginals.dtype)
    u, v = plan.new_empty((items, rows)), plan.new_empty((items, cols))
    params = _params(scores, call)
    params.u, params.v, params.plan = u.data_ptr(), v.data_ptr(), plan.data_ptr()
    run("sinkhorn_small", params, scores)
    return plan, u, v


def gradient(
    run: Callable[[str, SmallParams, Tensor], None],
    call: Call,
    grad_plan: Tensor | None,
    grad_u: Tensor | None,
    grad_v: Tensor | None,
) -> Tensor:
    """Gradient of the scores [G, n, K], in their dtype, by run("sinkhorn_small_backward", params, scores).

    grad_plan [G, n, K], grad_u [G, n], grad_v [G, K]: of the loss, contiguous, of the computing dtype; None: zeros."""
    scores = contiguous_items(call.scores)
    found = scores.new_empty(scores.shape)
    params = _params(scores, call)
    params.grad_plan, params.grad_u, params.grad_v = pointer(grad_plan), pointer(grad_u), pointer(grad_v)
    params.grad_scores = found.data_ptr()
    run("sinkhorn_small_backward", params, scores)
    return found


def _params(scores: Tensor, call: Call) -> SmallParams:
    items, rows, cols = scores.shape
    row_marginals, col_marginals = call.row_marginals, call.col_marginals
    return SmallParams(
        scores=scores.data_ptr(),
        row_marginals=row_marginals.data_ptr(),
        col_marginals=col_marginals.data_ptr(),
        item_stride=scores.stride(0),
        row_marginals_stride=rows if row_marginals.dim() == 2 else 0,
        col_marginals_stride=cols if col_marginals.dim() == 2 else 0,
        num_items=items,
        num_rows=rows,
        num_cols=cols,
        num_iters=call.num_iters,
        rows_first=call.order == "rows_cols",
        factor=LOG2E / call.epsilon,
        eps=call.eps,
        dtype=_native.DTYPE_CODES[scores.dtype],
    )
