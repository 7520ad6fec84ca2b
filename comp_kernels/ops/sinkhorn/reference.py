"""The definition of sinkhorn in plain PyTorch, in the log domain, one line per half step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ORDERS = ("cols_rows", "rows_cols")


def log_sum_exp_over_group(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp of x along `dim`, where the entries along `dim` are spread over the processes of `group`.

    Each process reduces its own entries to a (max, sum) pair per column; the pairs are merged by one all-reduce of the
    maximum and one of the rescaled sums. Not differentiable across processes.
    """
    if group is None:
        return log_sum_exp(x, dim)
    peak = x.amax(dim) if x.shape[dim] else torch.full_like(x.sum(dim), -torch.inf)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    shift = torch.where(peak.isfinite(), peak, 0.0)  # a column of -inf: its sum is exp(-inf) = 0, not NaN
    total = (x - shift.unsqueeze(dim)).exp().sum(dim)
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return total.log() + shift


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """torch.logsumexp with a gradient of zero, and not NaN, where all entries are -inf (a masked row or column)."""
    nothing = (x == -torch.inf).all(dim, keepdim=True)
    return torch.logsumexp(x.masked_fill(nothing, 0.0), dim).masked_fill(nothing.squeeze(dim), -torch.inf)


def without_empty_columns(scores: Tensor, col_marginals: Tensor) -> Tensor:
    """Scores of columns without mass as zeros: whatever they are (-inf all of them, say), the softmax over each is a number."""
    return scores.masked_fill((col_marginals == 0).unsqueeze(-2), 0.0)


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
    order: str = "cols_rows",
    eps: float = 0.0,
    return_potentials: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """P = exp(scores / epsilon + u + v) with row sums `row_marginals` and column sums `col_marginals`; see
    `comp_kernels.sinkhorn` for shapes. Differentiable by autograd through the iterations (single process only).

        repeat num_iters times:   v_k = log b_k - log sum_i exp(scores_ik / epsilon + u_i)     over all rows of the group
                                  u_i = log a_i - log sum_k exp(scores_ik / epsilon + v_k)     so the rows end exact

    With `tol`, stops early once sum_k |sum_i P_ik - b_k| <= tol * sum_k b_k in every batch item. order="rows_cols" is all this
    with rows and columns in each other's place; with `eps` see `scale_with_eps`.
    """
    if order == "rows_cols":
        rows, cols = marginals_or_defaults(scores, row_marginals, col_marginals, group)
        settings: dict[str, Any] = dict(epsilon=epsilon, num_iters=num_iters, tol=tol, group=group, eps=eps)
        plan, v, u = sinkhorn(scores.mT, row_marginals=cols, col_marginals=rows, **settings, return_potentials=True)
        return (plan.mT.contiguous(), u, v) if return_potentials else plan.mT.contiguous()
    compute = torch.promote_types(scores.dtype, torch.float32)
    log_kernel = scores.to(compute) / epsilon
    a, b = marginals_or_defaults(scores, row_marginals, col_marginals, group)
    if eps > 0:
        plan, u, v = scale_with_eps(log_kernel, a, b, num_iters, eps)
        return (plan, u, v) if return_potentials else plan
    mass, log_a, log_b = b.sum(-1), a.log(), b.log()

    u, v = log_a.new_zeros(log_a.shape), log_b.new_zeros(log_b.shape)
    u = torch.where(log_a == -torch.inf, log_a, u)  # rows without mass never count
    for _ in range(num_iters):
        v = scaling(log_b, log_sum_exp_over_group(log_kernel + u.unsqueeze(-1), -2, group))
        u = scaling(log_a, log_sum_exp(log_kernel + v.unsqueeze(-2), -1))
        if tol is not None:
            columns = log_sum_exp_over_group(log_kernel + u.unsqueeze(-1), -2, group) + v
            if bool(((columns.exp() - b).abs().sum(-1) <= tol * mass).all()):
                break
    plan = (log_kernel + u.unsqueeze(-1) + v.unsqueeze(-2)).exp()
    return (plan, u, v) if return_potentials else plan


def marginals_or_defaults(
    scores: Tensor, row_marginals: Tensor | None, col_marginals: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Marginals [..., n] and [..., K] in the computing dtype: rows of mass one, columns that share the mass of all rows."""
    compute = torch.promote_types(scores.dtype, torch.float32)
    *batch, num_rows, num_cols = scores.shape
    a = scores.new_ones(num_rows, dtype=compute) if row_marginals is None else row_marginals.to(compute)
    a = a.expand(*batch, num_rows)
    mass = a.sum(-1)
    if group is not None:
        dist.all_reduce(mass, group=group)
    b = mass.unsqueeze(-1) / num_cols if col_marginals is None else col_marginals.to(compute)
    return a, b.expand(*batch, num_cols)


def scale_with_eps(log_kernel: Tensor, a: Tensor, b: Tensor, num_iters: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The iteration of Megatron-LM and Liger-Kernel, which keeps sums away from zero: (M, u, v) with
    M = (softmax(log_kernel) + eps) exp(u + v), the softmax over each column.

        M = (softmax + eps) b_k     M *= a_i / (row sums + eps)
        num_iters - 1 times:        M *= b_k / (column sums + eps)     M *= a_i / (row sums + eps)
    """

    def log_of(scale: Tensor, marginal: Tensor) -> Tensor:
        return torch.where(marginal == 0, -torch.inf, torch.where(marginal == 0, 1.0, scale).log())

    v = log_of(b, b)
    u = torch.where(a == 0, -torch.inf, torch.zeros_like(a))
    softmax = torch.softmax(without_empty_columns(log_kernel, b), -2)
    plan = torch.where((a == 0).unsqueeze(-1), 0.0, softmax + eps) * b.unsqueeze(-2)
    for iteration in range(num_iters):
        if iteration > 0:
            scale = b / (plan.sum(-2) + eps)
            plan, v = plan * scale.unsqueeze(-2), v + log_of(scale, b)
        scale = a / (plan.sum(-1) + eps)
        plan, u = plan * scale.unsqueeze(-1), u + log_of(scale, a)
    return plan, u, v
