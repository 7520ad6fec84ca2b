"""The definition of sinkhorn in plain PyTorch, in the log domain, one line per half step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def log_sum_exp_over_group(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp of x along `dim`, where the entries along `dim` are spread over the processes of `group`.

    Each process reduces its own entries to a (max, sum) pair per column; the pairs are merged by one all-reduce of the
    maximum and one of the rescaled sums. Not differentiable across processes.
    """
    if group is None:
        return torch.logsumexp(x, dim)
    peak = x.amax(dim) if x.shape[dim] else torch.full_like(x.sum(dim), -torch.inf)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    shift = torch.where(peak.isfinite(), peak, 0.0)  # a column of -inf: its sum is exp(-inf) = 0, not NaN
    total = (x - shift.unsqueeze(dim)).exp().sum(dim)
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return total.log() + shift


def scaling(log_marginal: Tensor, log_sum: Tensor) -> Tensor:
    """The potential that brings a marginal from exp(log_sum) to exp(log_marginal); -inf (no mass) where the target is zero."""
    return torch.where(log_marginal == -torch.inf, log_marginal, log_marginal - log_sum)


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float,
    num_iters: int = 3,
    row_marginals: Tensor | None = None,
    col_marginals: Tensor | None = None,
    tol: float | None = None,
    group: dist.ProcessGroup | None = None,
    return_potentials: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """P = exp(scores / epsilon + u + v) with row sums `row_marginals` and column sums `col_marginals`; see
    `comp_kernels.sinkhorn` for shapes. Differentiable by autograd through the iterations (single process only).

        repeat num_iters times:   v_k = log b_k - log sum_i exp(scores_ik / epsilon + u_i)     over all rows of the group
                                  u_i = log a_i - log sum_k exp(scores_ik / epsilon + v_k)     so the rows end exact

    With `tol`, stops early once sum_k |sum_i P_ik - b_k| <= tol * sum_k b_k in every batch item.
    """
    compute = torch.promote_types(scores.dtype, torch.float32)
    log_kernel = scores.to(compute) / epsilon
    *batch, num_rows, num_cols = scores.shape
    a = log_kernel.new_ones(num_rows) if row_marginals is None else row_marginals.to(compute)
    a = a.expand(*batch, num_rows)
    mass = a.sum(-1)
    if group is not None:
        dist.all_reduce(mass, group=group)
    b = mass.unsqueeze(-1) / num_cols if col_marginals is None else col_marginals.to(compute)
    b = b.expand(*batch, num_cols)
    log_a, log_b = a.log(), b.log()

    u, v = log_a.new_zeros(log_a.shape), log_b.new_zeros(log_b.shape)
    u = torch.where(log_a == -torch.inf, log_a, u)  # rows without mass never count
    for _ in range(num_iters):
        v = scaling(log_b, log_sum_exp_over_group(log_kernel + u.unsqueeze(-1), -2, group))
        u = scaling(log_a, torch.logsumexp(log_kernel + v.unsqueeze(-2), -1))
        if tol is not None:
            columns = log_sum_exp_over_group(log_kernel + u.unsqueeze(-1), -2, group) + v
            if bool(((columns.exp() - b).abs().sum(-1) <= tol * mass).all()):
                break
    plan = (log_kernel + u.unsqueeze(-1) + v.unsqueeze(-2)).exp()
    return (plan, u, v) if return_potentials else plan
