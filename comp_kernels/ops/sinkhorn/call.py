"""One call of sinkhorn as its backends see it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What a backend is asked to compute. The fields stand in the order of the operator's schema."""

    scores: Tensor  # [..., n, K]; kernels get [n, K] or [G, n, K] with the last dimension contiguous, with a group the latter
    row_marginals: Tensor | None  # [n] or [..., n], of the computing dtype; kernels get [n] or [G, n], contiguous. None: ones
    col_marginals: Tensor | None  # [K] or [..., K], likewise. None: n / K each
    epsilon: float
    num_iters: int
    tol: float | None
    group: str | None  # name of a process group: an operator takes no Python objects
    order: str = "cols_rows"  # which side an iteration scales first; kernels get this one, but those of small matrices
    eps: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.scores.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.scores.dtype == torch.float64 else torch.float32

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Both, those that are None made."""
        rows, cols = self.row_marginals, self.col_marginals
        num_rows, num_cols = self.scores.shape[-2:]
        if rows is None:
            rows = self.scores.new_ones(num_rows, dtype=self.compute_dtype)
        if cols is None:
            cols = self.scores.new_full((num_cols,), num_rows / max(num_cols, 1), dtype=self.compute_dtype)
        return rows, cols

    def new_results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for P [..., n, K], u [..., n] and v [..., K]."""
        *batch, num_rows, num_cols = self.scores.shape
        new, dtype = self.scores.new_empty, self.compute_dtype
        # Sizes one by one: torch takes twice as long to read them from a tuple, and three times from a torch.Size.
        return (
            new(*batch, num_rows, num_cols, dtype=dtype),
            new(*batch, num_rows, dtype=dtype),
            new(*batch, num_cols, dtype=dtype),
        )


def item_stride(marginal: Tensor | None) -> int:
    """From the marginals [n] of one item to those of the next; 0 where all items share them."""
    return marginal.shape[1] if marginal is not None and marginal.dim() == 2 else 0
