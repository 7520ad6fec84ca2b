"""One call of alignment_loss as its backends see it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What a backend is asked to compute. The fields stand in the order of the operator's schema."""

    vision: Tensor  # [n, D]
    text: Tensor  # [n, D]
    prototypes: Tensor  # [V, D]
    prior: Tensor | None  # [V]
    valid: Tensor | None  # [n] bool
    mode: str
    epsilon: float
    temperature: float
    num_iters: int
    prior_temperature: float
    normalize: bool
    group: str | None  # name of a process group: an operator takes no Python objects
    gradient: bool  # whether that of vision is wanted
    prototype_gradient: bool  # whether that of prototypes is

    @property
    def device(self) -> torch.device:
        return self.vision.device
