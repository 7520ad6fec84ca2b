"""timm: Eva and EVA-02, PE, DINOv3, RoPE-ViT (axial and mixed), NaFlexViT, Gemma 4 and plain ViTs, attention swapped in place.

Read against timm 1.0.31. Another version that arranges a class differently is refused when patching, not at the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._padded import blocks_of, padded_attention, token_tables
from ._patching import Foreign, UnsupportedCall, patch_modules
from ._projections import READS, fused_qkv, normed_qkv, separate_qkv, split_fused


def linear_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    """One fused projection, or three with perhaps fewer key heads."""
    return separate_qkv(module, x) if module.qkv is None else fused_qkv(module, x)


def eva_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    """Eva's fused projection has biases for q and v alone, kept beside a linear layer without bias."""
    if module.qkv is None or module.q_bias is None:
        return linear_qkv(module, x)
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    qkv = module.qkv(x) + bias if module.qkv_bias_separate else F.linear(x, module.qkv.weight, bias)
    return split_fused(module, qkv)


@dataclass(frozen=True)
class TimmAttention:
    """One row of the table below: the classes, how they project, and whether they take a rotary embedding."""

    classes: tuple[str, ...]
    qkv: Callable[[Foreign, Tensor], tuple[Tensor, ...]]
    rope: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("x", "rope", "attn_mask", "is_causal") if self.rope else ("x", "attn_mask", "is_causal")

    @property
    def attributes(self) -> tuple[str, ...]:
        shared = ("qkv", "num_heads", "head_dim", "q_norm", "k_norm", "scale", "attn_drop", "norm", "gate", "proj", "proj_drop")
        return (*shared, "num_prefix_tokens", "rotate_half") if self.rope else shared

    def run(self, module: Foreign, arguments: dict[str, Any], backend: str | None) -> Tensor:
        check_dropout(module)
        if arguments.get("is_causal"):
            raise UnsupportedCall("is_causal=True is not served: rope_attention is bidirectional")
        x, rope = arguments["x"], arguments.get("rope")
        batch, tokens = x.shape[:2]
        mask = arguments.get("attn_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:  # [S, S] for all images, as scaled_dot_product_attention has it
            mask = mask[None, None]
        blocks = blocks_of(mask, batch, tokens, x.device)
        q, k, v = self.qkv(module, x)
        tables = rope_tables(rope, batch, tokens, module.num_prefix_tokens) if rope is not None else None
        pair_stride = (module.head_dim // 2 if module.rotate_half else 1) if rope is not None else None
        out = padded_attention(
            module.q_norm(q), module.k_norm(k), v, blocks, tables, scale=module.scale, pair_stride=pair_stride, backend=backend
        )
        out = module.norm(out.flatten(-2))
        if module.gate is not None:
            out = out * module.gate(x).sigmoid()
        return module.proj_drop(module.proj(out))


@dataclass(frozen=True)
class Gemma4Attention:
    """Of the tower of Gemma 4: separate projections, perhaps fewer key heads, norms in place of a scale. Each axis of the image
    turns one half of a head."""

    classes: tuple[str, ...] = ("gemma4_vit.Gemma4Attention",)
    parameters: tuple[str, ...] = ("x", "rope_cos", "rope_sin", "attn_mask")
    attributes: tuple[str, ...] = (*READS[normed_qkv], "o_proj", "attn_drop", "proj_drop")

    def run(self, module: Foreign, arguments: dict[str, Any], backend: str | None) -> Tensor:
        check_dropout(module)
        x = arguments["x"]
        batch, tokens = x.shape[:2]
        blocks = blocks_of(arguments.get("attn_mask"), batch, tokens, x.device)
        q, k, v = normed_qkv(module, x)
        tables = token_tables(arguments["rope_cos"], arguments["rope_sin"], batch, tokens)
        pair_stride = module.head_dim // 4
        out = padded_attention(q, k, v, blocks, tables, scale=1.0, pair_stride=pair_stride, backend=backend)
        return module.proj_drop(module.o_proj(out.flatten(-2)))


def check_dropout(module: Foreign) -> None:
    if module.training and module.attn_drop.p > 0:
        raise UnsupportedCall(f"attn_drop {module.attn_drop.p} in training is not served: set it to 0, or call model.eval()")


def rope_tables(rope: Tensor, batch: int, tokens: int, prefix: int) -> tuple[Tensor, Tensor]:
    """cos and sin of all tokens from timm's tensor, sin and then cos, of the patches behind `prefix` tokens.

    rope: [N, 2 W] for every image and head, [H, N, 2 W] per head (mixed), or [B, H or 1, N, 2 W]; gradients flow back to it.
    """
    if rope.shape[-2] != tokens - prefix:
        raise ValueError(f"rope must have a row for each of the {tokens - prefix} patches, got shape {tuple(rope.shape)}")
    if rope.dim() > 2:
        rope = rope.movedim(-3, -2)  # [.., N, H, 2 W]
        rope = rope[None] if rope.dim() == 3 else rope
        rope = rope.squeeze(2) if rope.shape[2] == 1 else rope
    sin, cos = rope.chunk(2, -1)
    return token_tables(cos, sin, batch, tokens)


FAMILIES = (
    TimmAttention(("eva.EvaAttention",), eva_qkv, rope=True),
    TimmAttention(("attention.AttentionRope",), linear_qkv, rope=True),
    TimmAttention(("attention.Attention",), linear_qkv, rope=False),
    Gemma4Attention(),
)


def patch_timm(model: nn.Module, *, backend: str | None = None, on_unsupported: str = "error") -> list[str]:
    """Make the attention of a timm ViT run on `rope_attention`; weights stay, outputs agree to rounding.

    Padding of NaFlex batches is skipped instead of masked: outputs at padding tokens differ (there attention gives zeros),
    those at patches and everything pooled from them do not.

    Args:
        backend:  as in `comp_kernels.rope_attention`.
        on_unsupported:  a call that cannot be served (attention dropout while training, a mask that is not made of blocks, a
            causal mask) raises UnsupportedCall with "error", and takes the original forward with "original".

    Returns the names of the patched modules. Raises ValueError, with the list of known classes, if there are none.
    """
    return patch_modules(model, FAMILIES, library="timm", backend=backend, on_unsupported=on_unsupported)
