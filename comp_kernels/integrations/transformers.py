"""Hugging Face transformers: vision towers whose attention is swapped in place, and an attention function to select by name.

Read against transformers 5.24. Another version that arranges a class differently is refused when patching, not at the
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
from ._projections import (
    READS,
    fused_grouped_qkv,
    fused_normed_qkv,
    fused_qkv,
    normed_before_heads_qk,
    normed_qk,
    normed_qkv,
    separate_qkv,
    separate_short_names_qkv,
)

# --- how the families differ ------------------------------------------------------------------------------------------------


def real_tables(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["position_embeddings"]


def complex_tables(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One complex number per token and pair, [S, 1, D / 2]."""
    turns = arguments["freqs_ci"].squeeze(1).to(arguments["hidden_states"].device)
    if not turns.is_complex():  # torch casts complex buffers too
        raise UnsupportedCall(
            f"freqs_ci must be complex, got {turns.dtype}: model.to(dtype) has dropped its imaginary part, and with it the "
            "rotation; load the model in that dtype instead"
        )
    return turns.real, turns.imag


def rotate_half(head_dim: int) -> None:
    """Channels D / 2 apart turn together, which is the default of rope_attention."""


def rotate_quarters(head_dim: int) -> int:
    """Each axis of the image turns one half of a head."""
    return head_dim // 4


def rotate_neighbours(head_dim: int) -> int:
    return 1


def all_channels(head_dim: int) -> None:
    """All of a head turns, which is the default of rope_attention."""


def three_axes(head_dim: int) -> int:
    """Time, rows and columns turn as many pairs each; what is left over stays."""
    return head_dim // 6 * 6


@dataclass(frozen=True)
class VisionAttention:
    """One row of the table below: the classes, and where their forward finds what rope_attention needs."""

    classes: tuple[str, ...]
    qkv: Callable[[Foreign, Tensor], tuple[Tensor, ...]]  # x [.., C] -> q, k, v [.., H, D]
    output: tuple[str, ...]  # the last projection, and what follows it
    scale: str = "scaling"
    dropout: str | None = "attention_dropout"  # None: it has none
    tables: Callable[[dict[str, Any]], tuple[Tensor, Tensor]] | None = None  # the call's arguments -> cos, sin; None: no RoPE
    pair_stride: Callable[[int], int | None] = rotate_half  # a function of the module: a patched model can be pickled
    rotary_dim: Callable[[int], int | None] = all_channels
    packed: bool = False  # always [T, C] or [1, T, C] with cu_seqlens; else [B, S, C] with a mask where a call has none
    weights: bool = True  # whether forward returns (out, attention weights)
    mask: str | None = "attention_mask"  # None: the model ignores masks
    parameters: tuple[str, ...] = ("hidden_states", "attention_mask", "position_embeddings")

    @property
    def attributes(self) -> tuple[str, ...]:
        return (*READS[self.qkv], *self.output, self.scale, *([self.dropout] if self.dropout else []))

    def run(self, module: Foreign, arguments: dict[str, Any], backend: str | None) -> Any:
        check_call(module, arguments, getattr(module, self.dropout) if self.dropout else 0.0)
        x, scale = arguments["hidden_states"], getattr(module, self.scale)
        mask = None if self.mask is None else arguments.get(self.mask)
        cu_seqlens = arguments["cu_seqlens"] if self.packed else arguments.get("cu_seqlens")
        tables = None if self.tables is None else self.tables(arguments)
        if cu_seqlens is not None:
            out = self.packed_heads(module, x, tables, cu_seqlens, mask, scale, backend)
        else:
            batch, tokens = x.shape[:2]
            blocks = blocks_of(mask, batch, tokens, x.device)
            q, k, v = self.qkv(module, x)
            if tables is not None:
                tables = token_tables(*tables, batch, tokens)
            pair_stride = self.pair_stride(q.shape[-1])
            out = padded_attention(q, k, v, blocks, tables, scale=scale, pair_stride=pair_stride, backend=backend)
        out = out.flatten(-2)
        for name in self.output:
            out = getattr(module, name)(out)
        return (out, None) if self.weights else out

    def packed_heads(
        self,
        module: Foreign,
        x: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor,
        mask: Tensor | None,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        """x [T, C] or [1, T, C] -> [.., T, H, D]."""
        if mask is not None:
            raise UnsupportedCall("attention_mask beside cu_seqlens is not served")
        if x.dim() == 3 and x.shape[0] != 1:
            raise UnsupportedCall(f"hidden_states with cu_seqlens must be [T, C] or [1, T, C], got {tuple(x.shape)}")
        q, k, v = (y.flatten(0, -3) for y in self.qkv(module, x))
        cos, sin = tables or (None, None)
        rotary_dim, pair_stride = self.rotary_dim(q.shape[-1]), self.pair_stride(q.shape[-1])
        out = rope_attention(
            q, k, v, cos, sin, cu_seqlens, rotary_dim=rotary_dim, pair_stride=pair_stride, scale=scale, backend=backend
        )
        return out.unflatten(0, x.shape[:-1])


packed_attention = partial(
    VisionAttention,
    output=("proj",),
    tables=real_tables,
    packed=True,
    weights=False,
    mask=None,
    parameters=("hidden_states", "cu_seqlens", "position_embeddings", "max_seqlen"),
)
packed_with_weights = partial(packed_attention, qkv=separate_qkv, output=("out_proj",), weights=True)
UNROTATED = ("hidden_states", "cu_seqlens", "max_seqlen")

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
            "qwen4_exp.Qwen4ExpVisionAttention",
            "glm4v.Glm4vVisionAttention",
            "glm4v_moe.Glm4vMoeVisionAttention",
            "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention",
            "cohere_compass.CohereCompassVisionAttention",
        ),
        fused_qkv,
    ),
    packed_attention(("qwen2_5_omni.Qwen2_5OmniVisionAttention",), separate_short_names_qkv),
    packed_attention(
        ("glm_ocr.GlmOcrVisionAttention", "glm5_next.Glm5NextVisionAttention", "dots3_note.Dots3NoteVisionAttention"),
        fused_normed_qkv,
    ),
    packed_attention(("exaone4_5.Exaone4_5_VisionAttention",), fused_grouped_qkv),
    packed_attention(
        (
            "kimi_k25.Kimi_K25VisionAttention",
            "muse_glimmer.MuseGlimmerVisionAttention",
            "muse_spark.MuseSparkVisionAttention",
        ),
        separate_qkv,
    ),
    packed_attention(("glm_image.GlmImageVisionAttention",), fused_qkv, tables=None, parameters=UNROTATED),
    packed_attention(
        ("cosmos3_edge.Cosmos3EdgeVisionAttention",),
        separate_qkv,
        output=("out_proj",),
        scale="scale",
        dropout="dropout",
        tables=None,
        parameters=UNROTATED,
    ),
    packed_with_weights(("video_llama_3.VideoLlama3VisionAttention", "paddleocr_vl.PaddleOCRVisionAttention")),
    packed_with_weights(("minimax_m3_vl.MiniMaxM3VLVisionAttention",), rotary_dim=three_axes),
    packed_with_weights(("inkling2.Inkling2VisionAttention",), pair_stride=rotate_neighbours),
    packed_with_weights(
        ("lfm3_vl.Lfm3VlVisionAttention",),
        qkv=normed_qk,
        mask="attention_mask",
        parameters=("hidden_states", "cu_seqlens", "position_embeddings", "max_seqlen", "attention_mask"),
    ),
    packed_with_weights(
        (
            "minicpm_ocr.MiniCPMOcrVisionAttention",
            "minicpmv4_6.MiniCPMV4_6VisionAttention",
            "minicpmv4_7.MiniCPMV4_7VisionAttention",
        ),
        tables=None,
        parameters=(*UNROTATED, "attention_mask"),
    ),
    packed_with_weights(
        ("hunyuan_vl.HunYuanVLVisionAttention", "hy_v4_vl.HYV4VLVisionAttention"),
        output=("o_proj",),
        dropout=None,
        tables=None,
        parameters=UNROTATED,
    ),
    VisionAttention(
        ("pixtral.PixtralAttention", "dinov3_vit.DINOv3ViTAttention", "eomt_dinov3.EomtDinov3Attention"),
        separate_qkv,
        output=("o_proj",),
        dropout="dropout",
        tables=real_tables,
    ),
    VisionAttention(
        ("step3p7.Step3p7VisionAttention",),
        separate_qkv,
        output=("out_proj",),
        scale="scale",
        dropout="dropout",
        tables=real_tables,
        parameters=("hidden_states", "position_embeddings", "attention_mask"),
    ),
    VisionAttention(
        ("gemma4.Gemma4VisionAttention",),
        normed_qkv,
        output=("o_proj",),
        tables=real_tables,
        pair_stride=rotate_quarters,
        parameters=("hidden_states", "position_embeddings", "attention_mask", "position_ids"),
    ),
    VisionAttention(
        ("llama4.Llama4VisionAttention",),
        separate_qkv,
        output=("o_proj",),
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
            "idefics2.Idefics2VisionAttention",
            "idefics3.Idefics3VisionAttention",
            "smolvlm.SmolVLMVisionAttention",
            "granite_docling.GraniteDoclingVisionAttention",
            "ovis2.Ovis2VisionAttention",
            "metaclip_2.MetaClip2Attention",
            "altclip.AltCLIPAttention",
            "chinese_clip.ChineseCLIPVisionAttention",
            "clipseg.CLIPSegAttention",
        ),
        separate_qkv,
        output=("out_proj",),
        scale="scale",
        dropout="dropout",
    ),
    VisionAttention(
        (
            "dinov2.Dinov2Attention",
            "dinov2_with_registers.Dinov2WithRegistersAttention",
            "vit.ViTAttention",
            "deit.DeiTAttention",
            "vit_mae.ViTMAEAttention",
            "vit_msn.ViTMSNAttention",
            "ijepa.IJepaAttention",
            "pixio.PixioAttention",
            "tipsv2.Tipsv2VisionAttention",
        ),
        separate_qkv,
        output=("o_proj",),
    ),
    VisionAttention(
        ("radio.RadioAttention",),
        separate_qkv,
        output=("o_proj",),
        parameters=("hidden_states", "attention_mask", "cu_seqlens"),
    ),
    VisionAttention(
        ("internvl.InternVLVisionAttention", "qianfan_ocr.QianfanOCRVisionAttention"),
        normed_before_heads_qk,
        output=("projection_layer", "projection_dropout"),
        scale="scale",
    ),
    VisionAttention(
        ("janus.JanusVisionAttention",), normed_qk, output=("projection_layer", "projection_dropout"), scale="scale"
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
