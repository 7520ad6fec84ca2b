"""One call of sinkhorn as its backends see it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What a backend is asked to compute. The fields stand in the order of the operator's schema."""

    scores: Tensor  # [..., n, K]; kernels get [G, n, K] with the last dimension contiguous
    row_marginals: Tensor  # [n] or [..., n], of the computing dtype; kernels get [n] or [G, n], contiguous
    col_marginals: Tensor  # [K] or [..., K], likewise
    epsilon: float
    num_iters: int
    tol: float | None
    group: str | None  # name of a process group: an operator takes no Python objects
    order: str = "cols_rows"  # which side an iteration scales first; kernels get this one, but those of small matrices
    eps: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.scores.device
