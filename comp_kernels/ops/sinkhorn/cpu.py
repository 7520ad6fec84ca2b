"""sinkhorn on the CPU: allocates the results and calls csrc/sinkhorn/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._units import LOG2E
from .._log_domain.cpu import call_step, column_statistics, update_row_statistics
from .._log_domain.over_group import group_by_name, solve_over_group
from . import small
from .call import Call
from .native import SolveParams


def unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu backend needs tensors on the cpu, not on {device}"
    return _native.cpu_unavailable_reason()


def declines(call: Call) -> str | None:
    return small.declines(call)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """P, u and v of a flat call."""
    if small.serves(call):
        return small.solve(_run_small, call)
    if call.group is not None:
        return _solve_over_group(call)
    plan, u, v = call.new_results()
    solve_into(plan, u, v, call)
    return plan, u, v


def solve_into(plan: Tensor, u: Tensor, v: Tensor, call: Call) -> None:
    """The same into memory that is there: plan, u and v, contiguous, of the computing dtype."""
    _native.cpu_function("sinkhorn_solve")(SolveParams.of(call, plan, u, v))


def small_gradient(call: Call, *cotangents: Tensor | None) -> Tensor:
    """Of the scores of small matrices, from those of plan, u and v: see small.gradient."""
    return small.gradient(_run_small, call, *cotangents)


def _run_small(function: str, params: small.SmallParams, scores: Tensor) -> None:
    _native.cpu_function(function)(params)


def _solve_over_group(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    scores, factor = call.scores, LOG2E / call.epsilon
    plan = torch.empty_like(scores, dtype=call.compute_dtype, memory_format=torch.contiguous_format)

    def columns(u2: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [column_statistics(item, factor, u) for item, u in zip(scores, u2)]
        return torch.stack([peaks for peaks, _ in pairs]), torch.stack([sums for _, sums in pairs])

    def rows(v2: Tensor) -> Tensor:
        peaks = v2.new_full(scores.shape[:2], -torch.inf)
        sums = torch.zeros_like(peaks)
        for item, v, peak, total in zip(scores, v2, peaks, sums):
            update_row_statistics(item, factor, peak, total, v)
        return peaks + sums.log2()

    marginals = (x.expand(scores.shape[0], -1) for x in call.marginals())
    group = group_by_name(call.group)
    u2, v2 = solve_over_group(columns, rows, *marginals, num_iters=call.num_iters, tol=call.tol, group=group)
    for item, u, v, out in zip(scores, u2, v2, plan):
        call_step("plan", item, factor, u2=u, v2=v, plan=out)
    return plan, u2 / LOG2E, v2 / LOG2E
