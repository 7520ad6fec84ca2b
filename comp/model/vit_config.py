"""ViTConfig: what distinguishes the supported vision towers, read from their Hugging Face configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AbsPosInterp, AbsPosOrder, PosMode, RopeDtype, need_choice, need_literals


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(kw_only=True)
class ViTConfig:
    """One vision transformer. The second half are the choices of CoMP (arXiv 2503.18931): comp.config.TowerChoices says what
    each does."""

    family: str
    """"siglip", "siglip2" (NaFlex), "dinov2", "aimv2", "aimv2_original" or "clip": whose weight names are used on disk."""
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    patch_size: int
    grid_size: int
    """Side of the learned position table, in patches: pre-training image size // patch size."""
    num_channels: int = 3
    activation: str = "gelu"
    """One of ACTIVATIONS; of the gate where gated_mlp."""
    gated_mlp: bool = False
    """SwiGLU: down(act(gate(x)) * up(x))."""
    norm: str = "layer"
    """"layer" (LayerNorm) or "rms" (RMSNorm)."""
    norm_eps: float = 1e-6
    patch_bias: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    layer_scale: bool = False
    num_prefix_tokens: int = 0
    """CLS and register tokens of the original tower."""
    embed_norm: bool = False
    """A norm after the patch embedding, before the position table is added (AIMv2)."""
    pre_norm: bool = False
    """A norm after the position table is added (CLIP)."""
    sincos_table: bool = False
    """The position table is computed, not learned (AIMv2 "native")."""
    image_mean: tuple[float, ...] = HALF[0]
    image_std: tuple[float, ...] = HALF[1]

    pos_mode: PosMode = "abs"
    abs_pos_order: AbsPosOrder = "merge"
    abs_pos_interp: AbsPosInterp = "bicubic"
    align_corners: bool = False
    antialias: bool = False
    rope_base: float = 10000.0
    rope_dtype: RopeDtype = "fp32"
    keep_prefix_tokens: bool = False
    final_norm: bool = True
    merge_size: int = 2
    hugging_face: dict[str, Any] = field(default_factory=dict)
    """The configuration this one was read from; written back by save_as_transformers."""

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "mlp_width", "patch_size", "grid_size", "num_channels", "merge_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        need_literals(self)
        need_choice("activation", self.activation, tuple(ACTIVATIONS))
        if self.width % self.num_heads or (self.head_dim % 4 and "rope" in self.pos_mode):
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, and the head size a multiple of 4 for 2D rotary "
                f"embedding, got hidden_size {self.width} and {self.num_heads} heads"
            )
        self.image_mean, self.image_std = tuple(self.image_mean), tuple(self.image_std)
        if self.align_corners and self.antialias:
            raise ValueError("align_corners and antialias cannot be combined: antialiased resampling has no aligned corners")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.patch_size**2

    @property
    def prefix_tokens(self) -> int:
        """Prefix tokens this encoder really has."""
        return self.num_prefix_tokens if self.keep_prefix_tokens else 0

    @classmethod
    def from_hugging_face(cls, config: dict[str, Any], **choices: Any) -> ViTConfig:
        """Read the content of a config.json: of a vision tower, or of a two-tower model that has one as `vision_config`.

        Args:
            choices:  fields of this class that override what the family uses, None leaves the family's value.

        Missing keys take the defaults of the transformers class of that model_type.
        Raises ValueError for a model_type that is not supported.
        """
        if config.get("model_type") == "comp_vision":  # what save_pretrained writes: the fields of this class
            own = {f.name: config[f.name] for f in fields(cls) if f.name in config}
            return cls(**{**own, **{name: value for name, value in choices.items() if value is not None}})
        vision = dict(config.get("vision_config") or config)
        model_type = vision.setdefault("model_type", f"{config.get('model_type')}_vision_model")
        if model_type not in READERS:
            raise ValueError(
                f"model_type must be one of {sorted(READERS)} (or a model with such a vision_config), got {model_type!r}"
            )
        read = READERS[model_type](vision)
        read.update({name: value for name, value in choices.items() if value is not None})
        return cls(hugging_face=vision, **read)


def one_side(value: int | list[int] | tuple[int, ...], name: str) -> int:
    """A side that a configuration may give as one number or as two equal ones."""
    sides = [value] if isinstance(value, int) else list(value)
    if len(set(sides)) != 1:
        raise ValueError(f"{name} must be square, got {value}")
    return sides[0]


def common(config: dict[str, Any], *, width: int, layers: int, heads: int, patch: int, image: int | None) -> dict[str, Any]:
    """Fields that every family spells alike; the arguments are the defaults of the transformers class."""
    patch_size = one_side(config.get("patch_size", patch), "patch_size")
    fields = dict(
        width=config.get("hidden_size", width),
        num_layers=config.get("num_hidden_layers", layers),
        num_heads=config.get("num_attention_heads", heads),
        patch_size=patch_size,
        num_channels=config.get("num_channels", 3),
    )
    if image is not None:
        fields["grid_size"] = one_side(config.get("image_size", image), "image_size") // patch_size
    return fields


def clip_blocks(config: dict[str, Any], *, patch: int, activation: str, norm_eps: float) -> dict[str, Any]:
    """What SigLIP has of CLIP."""
    return dict(
        common(config, width=768, layers=12, heads=12, patch=patch, image=224),
        mlp_width=config.get("intermediate_size", 3072),
        activation=config.get("hidden_act", activation),
        norm_eps=config.get("layer_norm_eps", norm_eps),
        final_norm=False,
    )


def read_siglip(config: dict[str, Any]) -> dict[str, Any]:
    return dict(clip_blocks(config, patch=16, activation="gelu_pytorch_tanh", norm_eps=1e-6), family="siglip")


def read_siglip2(config: dict[str, Any]) -> dict[str, Any]:
    fields = read_siglip(config)
    grid_size = math.isqrt(config.get("num_patches", 256))
    return dict(fields, family="siglip2", grid_size=grid_size, abs_pos_interp="bilinear", antialias=True)


def read_clip(config: dict[str, Any]) -> dict[str, Any]:
    return dict(
        clip_blocks(config, patch=32, activation="quick_gelu", norm_eps=1e-5),
        family="clip",
        patch_bias=False,
        num_prefix_tokens=1,
        pre_norm=True,
        image_mean=CLIP_STATISTICS[0],
        image_std=CLIP_STATISTICS[1],
    )


def read_dinov2(config: dict[str, Any]) -> dict[str, Any]:
    fields = common(config, width=768, layers=12, heads=12, patch=14, image=224)
    gated = config.get("use_swiglu_ffn", False)
    mlp_width = int(fields["width"] * config.get("mlp_ratio", 4))
    if gated:  # two thirds of the plain width, rounded up to a multiple of 8
        mlp_width = (int(mlp_width * 2 / 3) + 7) // 8 * 8
    return dict(
        fields,
        family="dinov2",
        mlp_width=mlp_width,
        gated_mlp=gated,
        activation="silu" if gated else config.get("hidden_act", "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-6),
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=True,
        num_prefix_tokens=1,
        image_mean=IMAGENET[0],
        image_std=IMAGENET[1],
    )


def read_dinov2_with_registers(config: dict[str, Any]) -> dict[str, Any]:
    fields = read_dinov2(dict({"patch_size": 16}, **config))
    return dict(fields, num_prefix_tokens=1 + config.get("num_register_tokens", 4), antialias=True)


def read_aimv2(config: dict[str, Any]) -> dict[str, Any]:
    qkv_bias = config.get("qkv_bias", False)
    return dict(
        common(config, width=1024, layers=24, heads=8, patch=14, image=224),
        family="aimv2",
        mlp_width=config.get("intermediate_size", 2816),
        gated_mlp=True,
        activation=config.get("hidden_act", "silu"),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-5),
        qkv_bias=qkv_bias,
        proj_bias=qkv_bias,
        mlp_bias=config.get("mlp_bias", False),
        embed_norm=True,
        sincos_table=config.get("is_native", False),
        image_mean=CLIP_STATISTICS[0],
        image_std=CLIP_STATISTICS[1],
    )


def read_aimv2_original(config: dict[str, Any]) -> dict[str, Any]:
    """Apple's own layout, model_type "aimv2" without a nested vision_config; use_bias rules projections and MLPs."""
    bias = config.get("use_bias", False)
    return dict(read_aimv2(config), family="aimv2_original", activation="silu", proj_bias=bias, mlp_bias=bias)


READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "siglip_vision_model": read_siglip,
    "siglip2_vision_model": read_siglip2,
    "clip_vision_model": read_clip,
    "dinov2": read_dinov2,
    "dinov2_with_registers": read_dinov2_with_registers,
    "aimv2_vision_model": read_aimv2,
    "aimv2": read_aimv2_original,
}
