"""Adapter: 2x2 neighbouring patches become one language-model token (CoMP, arXiv 2503.18931v2, Eq. 5)."""

from __future__ import annotations

import math
from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterInit, need_choice
from .layer_norm import LayerNorm
from .row_sizes import over_filled_rows


class Adapter(nn.Module):
    """LayerNorm of each patch, concatenation of the merge_size^2 patches of a block, Linear, GELU, Linear.

    Args:
        vision_width:  Dv of the patches.
        language_width:  of the language model's embeddings.
        init:  weights at first: "lecun" (normal, variance 1 / fan-in; the release with SigLIP) or "truncated" (normal cut at
            two standard deviations of `std`; the release with DINOv2). Biases start at zero.
    """

    def __init__(
        self, vision_width: int, language_width: int, *, merge_size: int = 2, init: AdapterInit = "lecun", std: float = 0.02
    ) -> None:
        super().__init__()
        need_choice("init", init, get_args(AdapterInit))
        self.merge_size, self.init, self.std = merge_size, init, std
        merged_width = vision_width * merge_size**2
        self.norm = LayerNorm(vision_width, eps=1e-6)
        self.fc1 = nn.Linear(merged_width, merged_width)
        self.fc2 = nn.Linear(merged_width, language_width)
        self.reset_parameters()

    @property
    def language_width(self) -> int:
        return self.fc2.out_features

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        for linear in (self.fc1, self.fc2):
            if self.init == "lecun":
                nn.init.normal_(linear.weight, std=math.sqrt(1 / linear.in_features))
            else:
                nn.init.trunc_normal_(linear.weight, std=self.std, a=-2 * self.std, b=2 * self.std)
            nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Patches [N, Dv] in merge-block order -> tokens [N / merge_size^2, D_language]."""
        blocks = self.norm(features).view(-1, self.fc1.in_features)
        return over_filled_rows(lambda x: self.fc2(F.gelu(self.fc1(x))), blocks)
