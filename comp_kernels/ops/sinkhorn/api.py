"""The public sinkhorn: argument checks, defaults, choice of backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..._backends import choose_backend, transforms_active
from ..._checks import (
    check_bool,
    check_choice,
    check_dense,
    check_float,
    check_group,
    check_num_iters,
    check_number,
    check_real,
    check_same,
    check_size,
    check_temperature,
    check_tensor,
    keepable,
    readable,
)
from . import gradients, reference
from .call import Call
from .registration import solve


# fmt: off
@overload
def sinkhorn(
    scores: Tensor, *, epsilon: float, num_iters: int = 3, row_marginals: Tensor | None = None,
    col_marginals: Tensor | None = None, tol: float | None = None, group: dist.ProcessGroup | None = None,
    gradient: str = "detach", order: str = "cols_rows", eps: float = 0.0, backend: str | None = None,
    return_potentials: Literal[False] = False,
) -> Tensor: ...
@overload
def sinkhorn(
    scores: Tensor, *, epsilon: float, num_iters: int = 3, row_marginals: Tensor | None = None,
    col_marginals: Tensor | None = None, tol: float | None = None, group: dist.ProcessGroup | None = None,
    gradient: str = "detach", order: str = "cols_rows", eps: float = 0.0, backend: str | None = None,
    return_potentials: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
# fmt: on


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float,
    num_iters: int = 3,
    row_marginals: Tensor | None = None,
    col_marginals: Tensor | None = None,
    tol: float | None = None,
    group: dist.ProcessGroup | None = None,
    gradient: str = "detach",
    order: str = "cols_rows",
    eps: float = 0.0,
    backend: str | None = None,
    return_potentials: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Entropic optimal transport (Sinkhorn-Knopp; Cuturi, arXiv 1306.0895) in the log domain, batched.

        P = exp(scores / epsilon + u + v), rows sum to row_marginals, columns to col_marginals.
        One iteration scales the columns, then the rows: after any number of iterations the rows are exact.

    Matrices of at most 32 x 32 entries, any number of them, have kernels of their own, forward and backward, unless `tol` or
    `group` is given: for the projections of hyper-connections (mHC, arXiv 2512.24880) see `order`, `eps` and docs/usage.md.

    Args:
        scores:  [..., n, K], float32, float64, bfloat16 or float16. Higher is closer (a similarity, not a cost).
        epsilon:  temperature of the scores, positive. A number, as are all settings: a tensor is refused, for it would receive
            no gradient (divide the scores by it instead). The potentials are as large as scores / epsilon and keep 7 digits
            (16 in float64): where scores / epsilon differ by millions, pass scores.double().
        num_iters:  iterations, at least 1 (at most, when `tol` is given).
        row_marginals:  [n] or [..., n], not negative, zeros allowed (a masked row). Default: ones.
        col_marginals:  [K] or [..., K], not negative, zeros allowed. Default: n / K each. Must have the sum of row_marginals.
        tol:  stop early once the column marginals' L1 error is at most tol times their sum, in every batch item.
        group:  a process group; the n rows are then this process's share of a batch, and column sums run over all of it.
        gradient:  how the scores receive one (marginals never do):

            - "detach": not at all; the result is a constant
            - "unrolled": through the iterations, exactly, whether they converged or not; not with `tol` or `group`
            - "implicit": of the converged plan (implicit function theorem), at a cost that does not grow with num_iters;
              meaningful once the column marginals are met, and for losses that stay when u and v become u + c and v - c (on the
              CPU others are refused); not with `group` or `eps`
        order:  which side an iteration scales first; the other one is exact after any number of iterations.

            - "cols_rows": columns, then rows, as in DINO, SwAV and POT
            - "rows_cols": rows, then columns: T_c(T_r(M)) of mHC (eq. 9), as in Megatron-LM, Liger-Kernel, vLLM; `tol`
              then looks at the rows. Not with `group`
        eps:  not 0: the iteration of Megatron-LM and Liger-Kernel (1e-6 there), which starts from M = softmax + eps along the
            side that is scaled first and divides by sums + eps from then on; P = (softmax + eps) exp(u + v). Neither side is
            exact then. Kernels serve it up to 32 x 32, the reference beyond. Not with `tol` or `group`.
        backend:  "reference", "cpu", "triton", "cuda" or None (by device).
        return_potentials:  also return u [..., n] and v [..., K].

    Returns:
        P [..., n, K] in float32 (float64 for float64 scores), or (P, u, v).

    Warns:
        RuntimeWarning: once, if kernels of a backend that nobody named cannot be compiled or launched; the next one runs.

    Raises:
        ValueError: shapes, dtypes or marginals that do not fit; on the CPU also a row or column whose scores are all -inf
            and whose marginal is positive.
        RuntimeError: a named backend cannot run this call; the message says why.
    """
    check_tensor("scores", scores, "[..., n, K]")
    check_dense("scores", scores)
    if scores.dim() < 2:
        raise ValueError(f"scores must be [..., n, K], got shape {tuple(scores.shape)}")
    check_float("scores", scores)
    epsilon = check_temperature("epsilon", epsilon, scores.dtype)
    check_num_iters(num_iters)
    if tol is not None:
        check_number("tol", tol)
        if not tol >= 0:
            raise ValueError(f"tol must not be negative or NaN, got {tol}")
        tol = float(tol)
    check_group(group)
    check_order(order, group)
    check_eps(eps, tol, group, gradient)
    eps = float(eps)
    check_size("eps", eps, scores.dtype)
    check_bool("return_potentials", return_potentials)
    check_gradient(gradient, tol, group, row_marginals, col_marginals)
    check_marginals(scores, row_marginals, col_marginals, group)

    rows, cols = used_marginals(scores, row_marginals, col_marginals, group)
    name = None if group is None else group.group_name
    call = Call(scores.detach() if gradient == "detach" else scores, rows, cols, epsilon, num_iters, tol, name, order, eps)
    backend, fallback = choose_backend("sinkhorn", backend, scores.device, call)
    # The processes of a group exchange sums in their backend's units: none may go on with another by itself.
    plan, u, v = solve(call, gradient, backend, fallback and group is None)
    if readable(u):
        last = u if order == "cols_rows" else v
        check_reachable(call, last.detach(), group)  # else autograd would keep it for the maximum's gradient
    return (plan, u, v) if return_potentials else plan


def check_reachable(call: Call, last: Tensor, group: dist.ProcessGroup | None) -> None:
    """Name a row or column that must have mass and has scores of -inf alone; looked for where the potentials tell of one:
    `last`, those of the side that is scaled last."""
    if last.numel() == 0 or last.max().item() < math.inf:  # the maximum of anything and NaN is NaN
        return
    scores, (rows, cols) = call.scores, call.marginals()
    for name, argument, dim, marginal in (("row", "row_marginals", -1, rows), ("column", "col_marginals", -2, cols)):
        if scores.shape[dim] == 0 or (name == "column" and group is not None):  # whose other rows are elsewhere
            continue
        found = ((scores == -torch.inf).all(dim) & (marginal > 0)).nonzero()
        if len(found):
            *item, index = found[0].tolist()
            where = f"{name} {index}" + (f" of item {item}" if item else "")
            raise ValueError(f"scores of {where} are all -inf, but its marginal is positive: set that of {argument} to zero")


def used_marginals(
    scores: Tensor, row_marginals: Tensor | None, col_marginals: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both marginals as `Call` has them: rows of mass one, columns that share the mass of all rows of the group."""
    *_, num_rows, num_cols = scores.shape
    dtype = torch.promote_types(scores.dtype, torch.float32)
    rows = None if row_marginals is None else keepable(row_marginals.detach().to(dtype))
    if col_marginals is not None:
        return rows, keepable(col_marginals.detach().to(dtype))
    if rows is None:
        if group is None:
            return None, None
        rows = scores.new_ones(num_rows, dtype=dtype)
    mass = rows.sum(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(mass, group=group)
    return rows, (mass / num_cols).expand(*mass.shape[:-1], num_cols)


def check_order(order: str, group: dist.ProcessGroup | None) -> None:
    check_choice("order", order, reference.ORDERS)
    if order != "cols_rows" and group is not None:
        raise ValueError(f"order={order!r} works within one process: group must be None, got {group}")


def check_eps(eps: float, tol: float | None, group: dist.ProcessGroup | None, gradient: str) -> None:
    check_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    if eps == 0:
        return
    for name, value in (("tol", tol), ("group", group)):
        if value is not None:
            raise ValueError(f"eps={eps} keeps sums from their marginals: {name} must be None, got {value}")
    if gradient == "implicit":
        raise ValueError(f"eps={eps} keeps sums from their marginals: use gradient='unrolled'")


def check_gradient(gradient: str, tol: float | None, group: dist.ProcessGroup | None, *marginals: Tensor | None) -> None:
    check_choice("gradient", gradient, gradients.MODES)
    if gradient == "detach":
        return
    if gradient == "implicit" and transforms_active():
        raise ValueError(
            "gradient='implicit' has no rules for torch.func transforms and forward-mode differentiation: "
            "use gradient='unrolled'"
        )
    if group is not None:
        raise ValueError(f"gradient={gradient!r} works within one process: group must be None, got {group}")
    if gradient == "unrolled" and tol is not None:
        raise ValueError(f"gradient='unrolled' needs a fixed number of iterations: tol must be None, got {tol}")
    for name, marginal in zip(("row_marginals", "col_marginals"), marginals):
        if marginal is not None and marginal.requires_grad:
            raise ValueError(f"{name} receives no gradient from gradient={gradient!r}: pass {name}.detach()")


def check_marginals(
    scores: Tensor, row_marginals: Tensor | None, col_marginals: Tensor | None, group: dist.ProcessGroup | None
) -> None:
    """Shapes everywhere; signs and equal sums where the values are on the CPU (on a GPU looking would wait for the device)."""
    if row_marginals is None and col_marginals is None:
        return
    *batch, num_rows, num_cols = scores.shape
    values = readable(scores)
    for name, marginal, length in (("row_marginals", row_marginals, num_rows), ("col_marginals", col_marginals, num_cols)):
        if marginal is None:
            continue
        check_tensor(name, marginal, f"[{length}] or [..., {length}]")
        check_dense(name, marginal)
        check_same(name, marginal, "scores", scores, dtype=False)
        check_real(name, marginal)
        shape = tuple(marginal.shape)
        # Not `in`, by which torch.compile compares a symbolic size with a number as if they were of two kinds.
        if shape != (length,) and shape != (*batch, length):
            raise ValueError(f"{name} must be {(length,)} or {(*batch, length)} for scores {tuple(scores.shape)}, got {shape}")
        if values and readable(marginal) and not bool((marginal >= 0).all()):
            raise ValueError(f"{name} must not be negative or NaN, got a minimum of {marginal.min().item()}")
    if not values or col_marginals is None or not readable(col_marginals):
        return
    rows = scores.new_ones(num_rows) if row_marginals is None else row_marginals
    row_sum = rows.double().sum(-1)
    if group is not None:
        dist.all_reduce(row_sum, group=group)
    col_sum = col_marginals.double().sum(-1)
    equal = (row_sum - col_sum).abs() <= 1e-4 * row_sum.abs()
    if not bool(equal.all()):
        item = (~equal).nonzero()[0].tolist()  # the first; [] where all share one
        sums = [x.expand_as(equal)[~equal][0].item() for x in (row_sum, col_sum)]
        where = f" in item {item}" if item else ""
        raise ValueError(f"row_marginals and col_marginals must have the same sum, got {sums[0]} and {sums[1]}{where}")
