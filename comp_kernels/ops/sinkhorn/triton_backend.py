"""sinkhorn in Triton: allocates results, launches triton_kernels. Nothing waits for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import _triton
from ..._units import LOG2E
from .._log_domain.over_group import group_by_name, solve_over_group
from . import small, triton_small
from .call import Call

if TYPE_CHECKING:
    from .triton_steps import Steps


def unavailable_reason(device: torch.device) -> str | None:
    return _triton.unavailable_reason(device)


def declines(call: Call) -> str | None:
    return "the Triton kernels have no float64" if call.scores.dtype == torch.float64 else small.declines(call)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """P, u and v of a flat call."""
    if small.serves(call):
        return triton_small.solve(call)
    from .triton_steps import Steps  # which imports triton

    steps = Steps(call.scores, LOG2E / call.epsilon)
    if call.group is None:
        u2, v2 = _iterate(call, steps) if call.tol is None else _iterate_until(call, steps, call.tol)
    else:
        u2, v2 = solve_over_group(
            lambda u2: steps.column_statistics(u2.contiguous()),
            lambda v2: steps.row_log_sums(v2.contiguous()),
            *(x.expand(call.scores.shape[0], -1) for x in call.marginals()),
            num_iters=call.num_iters,
            tol=call.tol,
            group=group_by_name(call.group),
        )
    return steps.plan(u2.contiguous(), v2.contiguous())


small_gradient = triton_small.gradient


def _iterate(call: Call, steps: Steps) -> tuple[Tensor, Tensor]:
    u2, v2 = steps.new_rows(), steps.new_cols()
    for iteration in range(call.num_iters):
        steps.scale_columns(iteration, call[1:3], u2, v2, v2)
        steps.scale_rows(call.row_marginals, u2)
    return u2, v2


def _iterate_until(call: Call, steps: Steps, tol: float) -> tuple[Tensor, Tensor]:
    """The error after an iteration is known once the next one has summed the columns; that one must then leave no trace."""
    u2, v2, v2_new = steps.new_rows(), steps.new_cols(), steps.new_cols()
    errors = call.scores.new_empty(steps.items, steps.blocks, dtype=torch.float32)
    stop = torch.zeros((), dtype=torch.int32, device=call.device)
    allowed = tol * call.marginals()[0].sum(-1)
    for iteration in range(call.num_iters):
        steps.scale_columns(iteration, call[1:3], u2, v2, v2_new, errors, stop)
        if iteration > 0:
            stop |= (errors.sum(-1) <= allowed).all()
        steps.scale_rows(call.row_marginals, u2, stop)
        v2 = torch.where(stop > 0, v2, v2_new)
    return u2, v2
