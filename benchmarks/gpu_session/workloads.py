"""Calls of rope_attention that models make on a GPU: packed images, counted operations, tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import comp_kernels as ck
from comp_kernels.testing import cumulative, grid_positions


@dataclass(frozen=True)
class Workload:
    """Packed images of one model."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int

    def flops(self, backward: bool) -> float:
        return 4 * self.head_dim * self.heads * sum(n * n for n in self.lengths) * (3.5 if backward else 1.0)


WORKLOADS = (
    Workload("ViT-B/16 224 px", (197,) * 64, 12, 64),
    Workload("SigLIP So400m 384 px", (729,) * 16, 16, 72),
    Workload("SigLIP NaFlex, mixed", (256, 576, 1024, 729, 400, 1369, 900, 2304), 16, 72),
    Workload("DINOv3-L 512 px", (1029,) * 16, 16, 64),
    Workload("Qwen2.5-VL windows", (64,) * 256, 16, 80),
    Workload("Qwen3-VL 1344 px", (7056, 7056), 16, 72),
    Workload("head dim 128", (1024,) * 12, 16, 128),
)
TINY_WORKLOADS = (Workload("equal lengths", (16, 16), 2, 16), Workload("mixed", (9, 25, 4), 2, 24))  # of the dry run
TINY_CASES = ("layout_half_hwhw", "cross")  # of comp_kernels.testing.ATTENTION_CASES, for the dry run


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor  # [T, D / 2] float32
    sin: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    prepared: dict = field(default_factory=dict)  # peer -> what it builds once per packing: a mask, a list of lengths

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def once(self, peer: str, build: Callable):
        """build(), called for the first use of this packing and not timed, as a model would share it between its layers."""
        if peer not in self.prepared:
            self.prepared[peer] = build()
        return self.prepared[peer]


def make_inputs(workload: Workload, device: str, dtype: torch.dtype) -> Inputs:
    tokens = sum(workload.lengths)
    q, k, v = torch.randn(3, tokens, workload.heads, workload.head_dim, device=device, dtype=dtype)
    freqs = ck.axial_freqs(workload.head_dim)[:, : workload.head_dim // 2]
    cos, sin = ck.rope_tables(grid_positions(list(workload.lengths))[:, 1:], freqs)
    bounds = cumulative(list(workload.lengths)).to(device)
    return Inputs(q, k, v, cos.to(device), sin.to(device), bounds, workload.lengths)


def ours(backend: str) -> Callable:
    """attend(x), rope_attention on that backend."""

    def attend(x: Inputs) -> Tensor:
        return ck.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens, backend=backend)

    return attend


def with_backward(attend: Callable, x: Inputs, cotangent: Tensor) -> Callable:
    """A function that returns the gradients of q, k and v."""
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    return lambda: torch.autograd.grad(attend(x), leaves, cotangent)
