"""Hugging Face transformers: vision towers whose attention is swapped in place, and an attention function to select by name.

Read against transformers 5.23. Another version that arranges a class differently is refused when patching, not at the
first call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..ops.rope_attention import rope_attention
from ._padded import blocks_of, padded_attention, token_tables
from ._patching import Foreign, UnsupportedCall, patch_modules

# --- how the families differ ------------------------------------------------------------------------------------------------


def fused_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    return module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(-3)


def separate_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(project(x).unflatten(-1, (-1, module.head_dim)) for project in (module.q_proj, module.k_proj, module.v_proj))


def normed_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = separate_qkv(module, x)
    return module.q_norm(q), module.k_norm(k), module.v_norm(v)


def real_tables(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["position_embeddings"]


def complex_tables(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One complex number per token and pair, [S, 1, D / 2]."""
    turns = arguments["freqs_ci"].squeeze(1).to(arguments["hidden_states"].device)
    return turns.real, turns.imag


def rotate_half(head_dim: int) -> None:
    """Channels D / 2 apart turn together, which is the default of rope_attention."""


def rotate_quarters(head_dim: int) -> int:
    """Rows turn the first half of a head, columns the second."""
    return head_dim // 4


def rotate_neighbours(head_dim: int) -> int:
    return 1


@dataclass(frozen=True)
class VisionAttention:
    """One row of the table below: the classes, and where their forward finds what rope_attention needs."""

    classes: tuple[str, ...]
    qkv: Callable[[Foreign, Tensor], tuple[Tensor, ...]]  # x [.., C] -> q, k, v [.., H, D]
    output: str  # the last projection
    scale: str = "scaling"
    dropout: str = "attention_dropout"
    tables: Callable[[dict[str, Any]], tuple[Tensor, Tensor]] | None = None  # the call's arguments -> cos, sin; None: no RoPE
    pair_stride: Callable[[int], int | None] = rotate_half  # a function of the module: a patched model can be pickled
    packed: bool = False  # hidden states [T, C] with cu_seqlens; else [B, S, C] with a mask
    mask: str | None = "attention_mask"  # None: the model ignores masks
    parameters: tuple[str, ...] = ("hidden_states", "attention_mask", "position_embeddings")

    @property
    def attributes(self) -> tuple[str, ...]:
        projections = ("qkv", "num_heads") if self.qkv is fused_qkv else ("q_proj", "k_proj", "v_proj", "head_dim")
        return (*projections, self.output, self.scale, self.dropout)

    def run(self, module: Foreign, arguments: dict[str, Any], backend: str | None) -> Any:
        check_call(module, arguments, getattr(module, self.dropout))
        x = arguments["hidden_states"]
        project, scale = getattr(module, self.output), getattr(module, self.scale)
        tables = None if self.tables is None else self.tables(arguments)
        if self.packed:
            q, k, v = self.qkv(module, x)
            cos, sin = tables or (None, None)
            out = rope_attention(q, k, v, cos, sin, arguments["cu_seqlens"], scale=scale, backend=backend)
            return project(out.flatten(-2))

        batch, tokens = x.shape[:2]
        mask = None if self.mask is None else arguments.get(self.mask)
        blocks = blocks_of(mask, batch, tokens, x.device)
        q, k, v = self.qkv(module, x)
        if tables is not None:
            tables = token_tables(*tables, batch, tokens)
        pair_stride = self.pair_stride(q.shape[-1])
        out = padded_attention(q, k, v, blocks, tables, scale=scale, pair_stride=pair_stride, backend=backend)
        return project(out.flatten(-2)), None


packed_attention = partial(
    VisionAttention,
    output="proj",
    tables=real_tables,
    packed=True,
    parameters=("hidden_states", "cu_seqlens", "position_embeddings", "max_seqlen"),
)

FAMILIES = (
    # Windowed layers of Qwen2.5-VL need nothing special: the model hands them the cu_seqlens of its windows.
    packed_attention(
        (
            "qwen2_vl.VisionAttention",
            "qwen2_5_vl.Qwen2_5_VLVisionAttention",
            "qwen3_vl.Qwen3VLVisionAttention",
            "qwen3_vl_moe.Qwen3VLMoeVisionAttention",
            "qwen3_5.Qwen3_5VisionAttention",
            "qwen3_5_moe.Qwen3_5MoeVisionAttention",
            "qwen3_omni_moe.Qwen3OmniMoeVisionAttention",
            "glm4v.Glm4vVisionAttention",
            "glm4v_moe.Glm4vMoeVisionAttention",
            "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention",
        ),
        fused_qkv,
    ),
    packed_attention(("kimi_k25.Kimi_K25VisionAttention",), separate_qkv),
    VisionAttention(
        ("pixtral.PixtralAttention", "dinov3_vit.DINOv3ViTAttention"),
        separate_qkv,
        output="o_proj",
        dropout="dropout",
        tables=real_tables,
    ),
    VisionAttention(
        ("gemma4.Gemma4VisionAttention",),
        normed_qkv,
        output="o_proj",
        tables=real_tables,
        pair_stride=rotate_quarters,
        parameters=("hidden_states", "position_embeddings", "attention_mask", "position_ids"),
    ),
    VisionAttention(
        ("llama4.Llama4VisionAttention",),
        separate_qkv,
        output="o_proj",
        tables=complex_tables,
        pair_stride=rotate_neighbours,
        mask=None,
        parameters=("hidden_states", "freqs_ci", "attention_mask"),
    ),
    VisionAttention(
        (
            "siglip.SiglipAttention",
            "siglip2.Siglip2Attention",
            "aimv2.Aimv2Attention",
            "clip.CLIPAttention",
            "idefics3.Idefics3VisionAttention",
            "smolvlm.SmolVLMVisionAttention",
            "metaclip_2.MetaClip2Attention",
        ),
        separate_qkv,
        output="out_proj",
        scale="scale",
        dropout="dropout",
    ),
    VisionAttention(
        (
            "dinov2.Dinov2Attention",
            "dinov2_with_registers.Dinov2WithRegistersAttention",
            "vit.ViTAttention",
            "ijepa.IJepaAttention",
        ),
        separate_qkv,
        output="o_proj",
    ),
)


def patch_transformers(model: nn.Module, *, backend: str | None = None, on_unsupported: str = "error") -> list[str]:
    """Make the vision attention of a Hugging Face model run on `rope_attention`; weights stay, outputs agree to rounding.

    Text towers inside the model (CLIP's, SigLIP's) are left alone. Attention weights are not computed.

    Args:
        model:  any module that contains vision attention of a known class, the tower alone or the whole VLM.
        backend:  as in `comp_kernels.rope_attention`.
        on_unsupported:  a call that cannot be served (attention dropout while training, a mask that is not made of blocks, a
            causal mask, output_attentions) raises UnsupportedCall with "error", and takes the original forward with
            "original".

    Returns the names of the patched modules. Raises ValueError, with the list of known classes, if there are none.
    """
    return patch_modules(
        model, FAMILIES, library="transformers", backend=backend, on_unsupported=on_unsupported, skip=is_text_attention
    )


def is_text_attention(module: nn.Module) -> bool:
    return "Text" in type(getattr(module, "config", None)).__name__


def check_call(module: nn.Module, arguments: dict[str, Any], dropout: float) -> None:
    """Raise UnsupportedCall for what neither a patched module nor the registered attention function can do."""
    if module.training and dropout > 0:
        raise UnsupportedCall(f"attention dropout {dropout} in training is not served: set it to 0, or call model.eval()")
    if arguments.get("is_causal") or (arguments.get("is_causal") is None and getattr(module, "is_causal", False)):
        raise UnsupportedCall("is_causal=True is not served: rope_attention is bidirectional")
    for name in ("sliding_window", "softcap", "s_aux"):
        if arguments.get(name) is not None:
            raise UnsupportedCall(f"{name} is not served, got {arguments[name]!r}")
    if arguments.get("output_attentions") or attentions_are_recorded():
        raise UnsupportedCall("output_attentions is not served: the attention weights are never in memory")


def attentions_are_recorded() -> bool:
    """Whether a transformers model is collecting attention weights right now: its modules are not told, a hook takes them."""
    recording = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(recording, "_active_collector", None)
    return collector is not None and "attentions" in (collector.get() or ())


# --- by name: config._attn_implementation -------------------------------------------------------------------------------------


def register_attention(name: str = "comp_kernels") -> None:
    """Register attention and mask functions with transformers, so that `attn_implementation=name` selects them.

    The two belong together: without a mask function of the same name transformers silently drops the padding mask. Patching
    is better where it is possible: an attention function gets q and k after rotation, so nothing is fused, and Qwen-style
    towers call it once per image. Raises ValueError for a name that transformers knows already.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    registered = [interface()._global_mapping.get(name) for interface in (AttentionInterface, AttentionMaskInterface)]
    if any(x not in (None, attention_function, mask_function) for x in registered):
        raise ValueError(f"name must be new to transformers, got {name!r}: every model that uses it would change")
    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, mask_function)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query, key, value [B, H, S, D] -> ([B, S, H, D], None), the signature of transformers' AttentionInterface."""
    check_call(module, kwargs, dropout)
    if query.shape[2] != key.shape[2]:
        raise UnsupportedCall(f"query has {query.shape[2]} tokens and key {key.shape[2]}: only self-attention is served")
    blocks = blocks_of(attention_mask, query.shape[0], query.shape[2], query.device)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return padded_attention(q, k, v, blocks, None, scale=scaling, pair_stride=None, backend=None), None


def mask_function(*, mask_function: Callable, attention_mask: Tensor | None = None, kv_length: int, **kwargs) -> Tensor | None:
    """The padding mask [B, S] itself, for `attention_function`; only for models that ask for a plain bidirectional mask."""
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        raise UnsupportedCall("only a plain bidirectional mask is served: select this attention for vision towers alone")
    return None if attention_mask is None else attention_mask[:, -kv_length:]
