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


WORKLOADS = (  # the most important first: a run may end before the last
    Workload("SigLIP So400m 384 px", (729,) * 16, 16, 72),
    Workload("ViT-B/16 224 px", (197,) * 64, 12, 64),
    Workload("SigLIP NaFlex, mixed", (256, 576, 1024, 729, 400, 1369, 900, 2304), 16, 72),
    Workload("Qwen2.5-VL windows", (64,) * 256, 16, 80),
    Workload("Qwen3-VL, one image of 8836", (8836,), 16, 72),
    Workload("DINOv3-L 512 px", (1029,) * 16, 16, 64),
    Workload("DINOv3-7B 512 px", (1029,) * 4, 32, 128),
    Workload("SigLIP 2 NaFlex 256", (256, 252, 255, 240, 247, 253, 250, 256) * 4, 16, 72),  # areas near 256 patches
    Workload("Qwen3-VL 1344 px", (7056, 7056), 16, 72),
    Workload("Qwen3-VL, one image of 35344", (35344,), 16, 72),
    Workload("head dim 128", (1024,) * 12, 16, 128),
)
TINY_WORKLOADS = (Workload("equal lengths", (16, 16), 2, 16), Workload("mixed", (9, 25, 4), 2, 24))  # of the dry run


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


def own_backends(device: str) -> list[str]:
    """Backends to report on: the kernels of a GPU; on the CPU, for the dry run, its own and the definition."""
    wanted = ("triton", "cuda") if device == "cuda" else ("cpu", "reference")
    return [backend for backend in ck.available_backends("rope_attention", device) if backend in wanted]


def largest_error(out: Tensor, x: Inputs, rows: int = 128) -> float:
    """Of the first `rows` queries of the first, the longest and the last image, against the definition in float32: all scores
    of an image of 35,344 patches would not fit."""
    bounds, found = x.cu_seqlens.tolist(), 0.0
    for image in {0, x.lengths.index(x.longest), len(x.lengths) - 1}:
        begin, end = bounds[image], bounds[image + 1]
        some, whole = slice(begin, min(end, begin + rows)), slice(begin, end)
        q, k, v = x.q[some].detach().float(), x.k[whole].detach().float(), x.v[whole].detach().float()
        bounds_q, bounds_k = (torch.tensor([0, len(t)], dtype=torch.int32, device=q.device) for t in (q, k))
        tables = dict(cos_k=x.cos[whole], sin_k=x.sin[whole], cu_seqlens_k=bounds_k)
        exact = ck.reference.rope_attention(q, k, v, x.cos[some], x.sin[some], bounds_q, **tables)
        found = max(found, (out[some].float() - exact).abs().max().item())
    return found


def ours(backend: str) -> Callable:
    """attend(x), rope_attention on that backend."""

    def attend(x: Inputs) -> Tensor:
        return ck.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens, backend=backend)

    return attend


def with_backward(attend: Callable, x: Inputs, cotangent: Tensor) -> Callable:
    """A function that returns the gradients of q, k and v."""
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    return lambda: torch.autograd.grad(attend(x), leaves, cotangent)


def without_gradient(attend: Callable, x: Inputs) -> Callable:
    def forward() -> Tensor:
        with torch.no_grad():
            return attend(x)

    return forward
