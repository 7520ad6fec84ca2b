"""Heads that turn feature maps of a plain vision transformer into class scores: linear, and UperNet over a feature pyramid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

STRIDES = (4, 8, 16, 32)
"""Of the pyramid's levels, in pixels: those of the convolutional backbones that UperNet was made for."""


def make_head(kind: str, width: int, patch_size: int, num_classes: int, channels: int) -> nn.Module:
    """A head for four maps of `width` channels: [4, B, D, h, w] -> scores [B, num_classes, h', w'], the grid of its choice.

    kind:      "linear" or "upernet".
    channels:  of UperNet inside.
    """
    if kind == "linear":
        return LinearHead(width, num_classes)
    if kind == "upernet":
        return PyramidUperNet(width, patch_size, num_classes, channels)
    raise ValueError(f"kind must be 'linear' or 'upernet', got {kind!r}")


class LinearHead(nn.Module):
    """Batch normalisation and one linear layer per patch on all four maps, as DINOv2's linear evaluation."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(4 * width), nn.Conv2d(4 * width, num_classes, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(torch.cat(list(maps), dim=1))


class PyramidUperNet(nn.Module):
    """UperNet (arXiv 1807.10221) of transformers on maps that all have the stride of a patch, resized to STRIDES first."""

    def __init__(self, width: int, patch_size: int, num_classes: int, channels: int):
        super().__init__()
        self.levels = nn.ModuleList(resizing(width, round(math.log2(patch_size / stride))) for stride in STRIDES)
        config = UperNetConfig(hidden_size=channels)
        config.num_labels = num_classes
        self.head = UperNetHead(config, in_channels=[width] * len(STRIDES))

    def forward(self, maps: Tensor) -> Tensor:
        return self.head([level(one) for level, one in zip(self.levels, maps)])


def resizing(width: int, doublings: int) -> nn.Module:
    """Doubles the sides of a map so many times by transposed convolutions; where negative, halves them by maxima."""
    if doublings < 0:
        return nn.Sequential(*(nn.MaxPool2d(2, ceil_mode=True) for _ in range(-doublings)))
    layers: list[nn.Module] = []
    for number in range(doublings):
        layers += [nn.BatchNorm2d(width), nn.GELU()] if number else []
        layers.append(nn.ConvTranspose2d(width, width, 2, stride=2))
    return nn.Sequential(*layers)
