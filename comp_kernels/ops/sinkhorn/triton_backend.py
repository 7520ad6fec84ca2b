"""sinkhorn in Triton: allocates results, launches triton_kernels. Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _triton
from ..._triton import alignment, cdiv, launch
from ..._units import LOG2E
from .._log_domain.over_group import group_by_name, solve_over_group
from . import small, triton_small
from .call import Call
from .triton_steps import (
    NUM_WARPS,
    column_statistics,
    column_step,
    column_tile,
    merge_rows,
    new_pairs,
    row_pairs,
)


def unavailable_reason(device: torch.device) -> str | None:
    return _triton.unavailable_reason(device)


def declines(call: Call) -> str | None:
    return "the Triton kernels have no float64" if call.scores.dtype == torch.float64 else small.declines(call)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """P [G, n, K], u [G, n], v [G, K]."""
    if small.serves(call):
        return triton_small.solve(call)
    scores, factor = call.scores, LOG2E / call.epsilon
    if call.group is None:
        u2, v2 = _iterate(call, factor) if call.tol is None else _iterate_until(call, factor, call.tol)
    else:
        u2, v2 = solve_over_group(
            lambda u2: column_statistics(scores, factor, u2),
            lambda v2: _row_log_sums(scores, factor, v2),
            *(x.expand(scores.shape[0], -1) for x in (call.row_marginals, call.col_marginals)),
            num_iters=call.num_iters,
            tol=call.tol,
            group=group_by_name(call.group),
        )
    return plan(scores, factor, u2, v2), u2 / LOG2E, v2 / LOG2E


small_gradient = triton_small.gradient


def _first_potentials(call: Call) -> tuple[Tensor, Tensor]:
    """u2 [G, n] and memory for v2 [G, K]."""
    items, rows, cols = call.scores.shape
    u2 = torch.where(call.row_marginals > 0, 0.0, -torch.inf).expand(items, rows).contiguous()
    return u2, call.scores.new_empty((items, cols), dtype=torch.float32)


def _iterate(call: Call, factor: float) -> tuple[Tensor, Tensor]:
    u2, v2 = _first_potentials(call)
    pairs = new_pairs(call.scores)
    for iteration in range(call.num_iters):
        column_step(call.scores, factor, u2, v2, call.col_marginals, v2, pairs, first=iteration == 0)
        merge_rows(*pairs, a=call.row_marginals, u2=u2)
    return u2, v2


def _iterate_until(call: Call, factor: float, tol: float) -> tuple[Tensor, Tensor]:
    """The error after an iteration is known once the next one has summed the columns; that one must then leave no trace."""
    scores, a = call.scores, call.row_marginals
    items, rows, cols = scores.shape
    u2, v2 = _first_potentials(call)
    v2_new = torch.empty_like(v2)
    stop = torch.zeros((), dtype=torch.int32, device=scores.device)
    errors = scores.new_zeros((items, cdiv(cols, column_tile(rows, cols)["BK"])), dtype=torch.float32)
    allowed = tol * a.sum(-1)
    pairs = new_pairs(scores)
    for iteration in range(call.num_iters):
        first = iteration == 0
        column_step(scores, factor, u2, v2, call.col_marginals, v2_new, pairs, errors=errors, stop=stop, first=first)
        if not first:
            stop |= (errors.sum(-1) <= allowed).all()
        merge_rows(*pairs, a=a, u2=u2, stop=stop)
        v2 = torch.where(stop > 0, v2, v2_new)
    return u2, v2


def _row_log_sums(scores: Tensor, factor: float, v2: Tensor) -> Tensor:
    peaks = v2.new_full(scores.shape[:2], -torch.inf)
    sums = torch.zeros_like(peaks)
    merge_rows(*row_pairs(scores, factor, v2), peaks=peaks, sums=sums)
    return peaks + sums.log2()


def plan(scores: Tensor, factor: float, u2: Tensor, v2: Tensor) -> Tensor:
    """[G, n, K] = 2^(entry + u2 + v2)."""
    from .triton_kernels import plan_kernel

    items, rows, cols = scores.shape
    out = scores.new_empty(scores.shape, dtype=torch.float32)
    tile = column_tile(rows, cols)
    launch(
        plan_kernel,
        (cdiv(cols, tile["BK"]), items, cdiv(rows, tile["BN"])),
        scores, u2, v2, out,
        rows, cols, scores.stride(0), scores.stride(1), factor,
        ALIGN=alignment(scores),
        **tile,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
