"""Sinkhorn over the processes of a group: each holds some rows, columns are summed over all of them.

Per iteration the columns' (maximum, sum) pairs are merged by one all-reduce of each, K numbers per item; rows are local.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def group_by_name(name: str | None) -> dist.ProcessGroup | None:
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def merge_over_group(peaks: Tensor, sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log2 of sum 2^peak * sum over the processes (and no communication at all without a group)."""
    if group is not None:
        own = peaks.clone()
        dist.all_reduce(peaks, dist.ReduceOp.MAX, group=group)
        sums = torch.where(own == -torch.inf, 0.0, sums * torch.exp2(own - peaks))
        dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    return peaks + sums.log2()


def scale(marginal: Tensor, log2_sum: Tensor) -> Tensor:
    """The potential in bits that turns a sum into its marginal; -inf where the marginal is zero."""
    return torch.where(marginal == 0, -torch.inf, marginal.log2() - log2_sum)


def solve_over_group(
    column_statistics: Callable[[Tensor], tuple[Tensor, Tensor]],
    row_log_sums: Callable[[Tensor], Tensor],
    row_marginals: Tensor,
    col_marginals: Tensor,
    *,
    num_iters: int,
    tol: float | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The potentials (u2 [..., n], v2 [..., K]) in bits after `num_iters` iterations, or fewer once within `tol`.

    column_statistics(u2) -> (peaks, sums) [..., K] over the local rows; row_log_sums(v2) -> log2 of the row sums [..., n].
    """
    u2 = torch.where(row_marginals > 0, 0.0, -torch.inf).to(row_marginals.dtype)
    v2: Tensor | None = None
    done = torch.zeros((), dtype=torch.bool, device=u2.device)
    for _ in range(num_iters):
        column_sums = merge_over_group(*column_statistics(u2), group)
        if tol is not None and v2 is not None:
            # The columns' sums before they are scaled are the error after the last iteration.
            sums = torch.where(col_marginals > 0, torch.exp2(column_sums + v2), 0.0)
            error = (sums - col_marginals).abs().sum(-1)
            done = done | (error <= tol * col_marginals.sum(-1)).all()
            if done.device.type == "cpu" and bool(done):
                break
        new_v2 = scale(col_marginals, column_sums)
        new_u2 = scale(row_marginals, row_log_sums(new_v2))
        if tol is None or v2 is None:
            u2, v2 = new_u2, new_v2
        else:  # a GPU is not waited for: the remaining iterations leave the potentials as they are
            u2, v2 = torch.where(done, u2, new_u2), torch.where(done, v2, new_v2)
    assert v2 is not None  # num_iters is at least 1
    return u2, v2
