"""Layers without state for `kernelize` of Hugging Face `kernels`: their `forward` replaces that of a layer of the same name."""

from __future__ import annotations

from torch import Tensor, nn

from .ops.rope_attention import rope_attention

__all__ = ["RopeAttention"]


class RopeAttention(nn.Module):
    """`rope_attention` as a layer, for models that call theirs with packed q, k, v [T, H, D], tables and cu_seqlens."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[T, H, D], as `rope_attention`."""
        return rope_attention(q, k, v, cos, sin, cu_seqlens)
