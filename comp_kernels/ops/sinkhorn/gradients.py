"""Gradients of sinkhorn with respect to the scores, in plain PyTorch; the derivations are in README.md.

Both take grad_plan [..., n, K], grad_u [..., n], grad_v [..., K] (gradients of the loss, None for absent) and return the
gradient of the scores [..., n, K] in the computing dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import readable
from .reference import scaling, without_empty_columns

MODES = ("detach", "unrolled", "implicit")
MAX_CONJUGATE_GRADIENT_STEPS = 200


def unrolled(
    scores: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    grad_plan: Tensor | None,
    grad_u: Tensor | None,
    grad_v: Tensor | None,
    *,
    epsilon: float,
    num_iters: int,
    order: str = "cols_rows",
    eps: float = 0.0,
) -> Tensor:
    """Exact gradient of the `num_iters` iterations; the potentials of every iteration are recomputed, [n] and [K] each."""
    if order == "rows_cols":
        grad_plan = None if grad_plan is None else grad_plan.mT
        return unrolled(
            scores.mT, col_marginals, row_marginals, grad_plan, grad_v, grad_u, epsilon=epsilon, num_iters=num_iters, eps=eps
        ).mT
    if eps > 0:
        return (
            _unrolled_with_eps(
                scores.to(row_marginals.dtype) / epsilon,
                row_marginals,
                col_marginals,
                grad_plan,
                grad_u,
                grad_v,
                num_iters,
                eps,
            )
            / epsilon
        )
    log_kernel = scores.to(row_marginals.dtype) / epsilon
    log_a, log_b = row_marginals.log(), col_marginals.log()
    u = torch.where(log_a == -torch.inf, log_a, 0.0).expand(scores.shape[:-1])
    steps = []
    for _ in range(num_iters):
        column_sums = torch.logsumexp(log_kernel + u.unsqueeze(-1), -2)
        v = scaling(log_b, column_sums)
        row_sums = torch.logsumexp(log_kernel + v.unsqueeze(-2), -1)
        steps.append((u, finite(column_sums), v, finite(row_sums)))
        u = scaling(log_a, row_sums)

    gradient = _through_plan((log_kernel + u.unsqueeze(-1) + v.unsqueeze(-2)).exp(), grad_plan)
    du, dv = _potential_gradients(gradient, grad_u, grad_v)
    for u, column_sums, v, row_sums in reversed(steps):
        # u = log a - logsumexp_k(log_kernel + v): minus the softmax over the row
        du = torch.where(log_a == -torch.inf, 0.0, du)
        through_rows = du.unsqueeze(-1) * (log_kernel + v.unsqueeze(-2) - row_sums.unsqueeze(-1)).exp()
        gradient -= through_rows
        # v = log b - logsumexp_i(log_kernel + u): minus the softmax over the column
        dv = torch.where(log_b == -torch.inf, 0.0, dv - through_rows.sum(-2))
        through_columns = dv.unsqueeze(-2) * (log_kernel + u.unsqueeze(-1) - column_sums.unsqueeze(-2)).exp()
        gradient -= through_columns
        du, dv = -through_columns.sum(-1), torch.zeros_like(dv)
    return gradient / epsilon


def finite(log_sums: Tensor) -> Tensor:
    """Zero for a sum of nothing, a masked row of scores of -inf: its shares exp(entry - sum) are then zero, and not NaN."""
    return torch.where(log_sums == -torch.inf, 0.0, log_sums)


def implicit(
    plan: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    grad_plan: Tensor | None,
    grad_u: Tensor | None,
    grad_v: Tensor | None,
    *,
    epsilon: float,
) -> Tensor:
    """Gradient of the converged plan, by the implicit function theorem; exact when both marginals of `plan` are exact.

    Solves  [diag a, P; P^T, diag b] [x; y] = [row sums; column sums] of grad_plan * P  by conjugate gradients on the rows'
    Schur complement; the system is singular (x + c, y - c), and any solution serves.
    """
    check_level(grad_u, grad_v)
    gradient = _through_plan(plan, grad_plan)
    r, c = _potential_gradients(gradient, grad_u, grad_v)
    inverse_a = torch.where(row_marginals > 0, 1 / row_marginals, 0.0)
    inverse_b = torch.where(col_marginals > 0, 1 / col_marginals, 0.0)
    root = inverse_a.sqrt()

    def times(x: Tensor) -> Tensor:  # P x
        return (plan @ x.unsqueeze(-1)).squeeze(-1)

    def transposed_times(x: Tensor) -> Tensor:  # P^T x
        return (plan.mT @ x.unsqueeze(-1)).squeeze(-1)

    def schur(z: Tensor) -> Tensor:  # (1 - a^-1/2 P b^-1 P^T a^-1/2) z
        return z - root * times(inverse_b * transposed_times(root * z))

    null = row_marginals.sqrt().expand_as(r)  # schur(null) = 0: x + c, y - c
    null = null / null.square().sum(-1, keepdim=True).sqrt().clamp(min=torch.finfo(null.dtype).tiny)
    z = _conjugate_gradients(schur, root * (r - times(inverse_b * c)), null)
    x = root * z
    y = inverse_b * (c - transposed_times(x))
    return (gradient - plan * (x.unsqueeze(-1) + y.unsqueeze(-2))) / epsilon


def check_level(grad_u: Tensor | None, grad_v: Tensor | None) -> None:
    """Refuse a loss that changes when u becomes u + c and v becomes v - c: the plan stays, and what level the iterations end at
    no equation of the converged plan says. Looked for where the values may be looked at."""
    signed = [(sign * x, x.abs()) for sign, x in ((1, grad_u), (-1, grad_v)) if x is not None]
    if not signed or not readable(signed[0][0]):
        return
    change, size = (sum(x.sum(-1) for x in of_both) for of_both in zip(*signed))
    if bool((torch.as_tensor(change).abs() > 1e-3 * size).any()):
        raise ValueError(
            "gradient='implicit' is that of the converged plan, for which u + c and v - c are as good as u and v: the loss "
            "must not depend on c (subtract means from the potentials, say), or use gradient='unrolled'"
        )


def _unrolled_with_eps(log_kernel, a, b, grad_plan, grad_u, grad_v, num_iters: int, eps: float) -> Tensor:
    """The same for `reference.scale_with_eps`: M = x E w with E = softmax + eps, of which x and w are kept per iteration."""
    softmax = torch.softmax(without_empty_columns(log_kernel, b), -2)
    kernel = softmax + eps
    x, w = torch.where(a == 0, 0.0, 1.0).expand(log_kernel.shape[:-1]), b.expand(*log_kernel.shape[:-2], b.shape[-1])
    steps: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []  # scalings before, divisors of w and x
    for iteration in range(num_iters):
        before, w_divisor = (x, w), None
        if iteration > 0:
            w_divisor = w * (kernel.mT @ x.unsqueeze(-1)).squeeze(-1) + eps
            w = w * b / w_divisor
        x_divisor = x * (kernel @ w.unsqueeze(-1)).squeeze(-1) + eps
        x = x * a / x_divisor
        steps.append((*before, w_divisor, x_divisor))

    outer = x.unsqueeze(-1) * w.unsqueeze(-2)
    gradient = torch.zeros_like(kernel) if grad_plan is None else grad_plan * outer  # of the kernel's entries
    du, dv = _potential_gradients(gradient * kernel, grad_u, grad_v)
    for x, w, w_divisor, x_divisor in reversed(steps):
        w_after = w if w_divisor is None else w * b / w_divisor
        du = torch.where(a == 0, 0.0, du)
        row_sums = -du * x / x_divisor  # their gradient
        gradient = gradient + row_sums.unsqueeze(-1) * w_after.unsqueeze(-2)
        dv = dv + w_after * (kernel.mT @ row_sums.unsqueeze(-1)).squeeze(-1)
        du = du * eps / x_divisor
        if w_divisor is not None:
            dv = torch.where(b == 0, 0.0, dv)
            column_sums = -dv * w / w_divisor
            gradient = gradient + x.unsqueeze(-1) * column_sums.unsqueeze(-2)
            du = du + x * (kernel @ column_sums.unsqueeze(-1)).squeeze(-1)
            dv = dv * eps / w_divisor
    return softmax * (gradient - (softmax * gradient).sum(-2, keepdim=True))


def _through_plan(plan: Tensor, grad_plan: Tensor | None) -> Tensor:
    """Gradient of the logarithm of the plan's entries."""
    return torch.zeros_like(plan) if grad_plan is None else plan * grad_plan


def _potential_gradients(gradient: Tensor, grad_u: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor, Tensor]:
    du, dv = gradient.sum(-1), gradient.sum(-2)
    return du if grad_u is None else du + grad_u, dv if grad_v is None else dv + grad_v


def _conjugate_gradients(operator, rhs: Tensor, null: Tensor) -> Tensor:
    """Solve operator(x) = rhs for every batch item, operator symmetric and positive semi-definite, rhs in its range but for
    rounding, which the unit vector `null` of its null space takes.

    Items that have stopped stand still, for their gradient must not depend on the others': one that began again would run away
    along what the operator maps to zero. On a GPU nothing waits for the device, so all steps run.
    """

    def in_range(x: Tensor) -> Tensor:
        return x - (x * null).sum(-1, keepdim=True) * null

    x, residual = torch.zeros_like(rhs), in_range(rhs)
    direction, square = residual.clone(), residual.square().sum(-1, keepdim=True)
    enough = square * torch.finfo(rhs.dtype).eps ** 2
    smallest = 8 * torch.finfo(rhs.dtype).eps
    running = torch.ones_like(square, dtype=torch.bool)
    for _ in range(min(MAX_CONJUGATE_GRADIENT_STEPS, 2 * rhs.shape[-1])):
        image = operator(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        # What is left of a rounded residual lies where the operator is zero: a step there is as long as its curvature is small,
        # and what it adds cancels between x and y to nothing but rounding. Eigenvalues lie in 0 .. 1.
        running = running & (square > enough) & (curvature > smallest * direction.square().sum(-1, keepdim=True))
        if rhs.device.type == "cpu" and not bool(running.any()):
            break
        step = torch.where(running, square / torch.where(running, curvature, 1.0), 0.0)
        x = x + step * direction
        residual = in_range(residual - step * image)
        new_square = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(running, new_square / torch.where(running, square, 1.0), 0.0) * direction
        square = new_square
    return x
