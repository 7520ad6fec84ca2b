"""The public sinkhorn: argument checks, defaults, choice of backend."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..._backends import choose_backend
from ..._checks import check_float, check_positive, check_same, check_tensor
from . import reference


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float,
    num_iters: int = 3,
    row_marginals: Tensor | None = None,
    col_marginals: Tensor | None = None,
    tol: float | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    return_potentials: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Entropic optimal transport (Sinkhorn-Knopp; Cuturi, arXiv 1306.0895) in the log domain, batched.

        P = exp(scores / epsilon + u + v), rows sum to row_marginals, columns to col_marginals.
        One iteration scales the columns, then the rows: after any number of iterations the rows are exact.

    Args:
        scores:  [..., n, K], float32, float64, bfloat16 or float16. Higher is closer (a similarity, not a cost).
        epsilon:  temperature of the scores, positive.
        num_iters:  iterations, at least 1 (at most, when `tol` is given).
        row_marginals:  [n] or [..., n], not negative, zeros allowed (a masked row). Default: ones.
        col_marginals:  [K] or [..., K], not negative, zeros allowed. Default: n / K each. Must have the sum of row_marginals.
        tol:  stop early once the column marginals' L1 error is at most tol times their sum, in every batch item.
        group:  a process group; the n rows are then this process's share of a batch, and column sums run over all of it.
        backend:  "reference", "cpu", "triton", "cuda" or None (by device).
        return_potentials:  also return u [..., n] and v [..., K].

    Returns:
        P [..., n, K] in float32 (float64 for float64 scores), or (P, u, v).

    Raises:
        ValueError: shapes, dtypes or marginals that do not fit. RuntimeError: a named backend cannot run this call.
    """
    check_tensor("scores", scores, "[..., n, K]")
    if scores.dim() < 2:
        raise ValueError(f"scores must be [..., n, K], got shape {tuple(scores.shape)}")
    check_float("scores", scores)
    check_positive("epsilon", epsilon)
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}")
    check_marginals(scores, row_marginals, col_marginals, group)
    choose_backend("sinkhorn", backend, scores.device)
    return reference.sinkhorn(
        scores,
        epsilon=epsilon,
        num_iters=num_iters,
        row_marginals=row_marginals,
        col_marginals=col_marginals,
        tol=tol,
        group=group,
        return_potentials=return_potentials,
    )


def check_marginals(
    scores: Tensor, row_marginals: Tensor | None, col_marginals: Tensor | None, group: dist.ProcessGroup | None
) -> None:
    """Shapes everywhere; signs and equal sums where the values are on the CPU (on a GPU looking would wait for the device)."""
    *batch, num_rows, num_cols = scores.shape
    for name, marginal, length in (("row_marginals", row_marginals, num_rows), ("col_marginals", col_marginals, num_cols)):
        if marginal is None:
            continue
        check_tensor(name, marginal, f"[{length}] or [..., {length}]")
        check_same(name, marginal, "scores", scores, dtype=False)
        if tuple(marginal.shape) not in ((length,), (*batch, length)):
            raise ValueError(
                f"{name} must be {(length,)} or {(*batch, length)} for scores {tuple(scores.shape)}, "
                f"got {tuple(marginal.shape)}"
            )
        if marginal.device.type == "cpu" and not bool((marginal >= 0).all()):
            raise ValueError(f"{name} must not be negative or NaN, got a minimum of {marginal.min().item()}")
    if scores.device.type != "cpu" or col_marginals is None:
        return
    rows = scores.new_ones(num_rows) if row_marginals is None else row_marginals
    row_sum = rows.double().sum(-1)
    if group is not None:
        dist.all_reduce(row_sum, group=group)
    col_sum = col_marginals.double().sum(-1)
    if not bool(((row_sum - col_sum).abs() <= 1e-4 * row_sum.abs()).all()):
        raise ValueError(
            f"row_marginals and col_marginals must have the same sum, got {row_sum.tolist()} and {col_sum.tolist()}"
        )
