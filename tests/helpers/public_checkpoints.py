"""What the public checkpoints of the recipes hold: config.json and the name and shape of every tensor, written down from public
sources and not from transformers' classes of today, which tests compare with it.

Names of tensors: the conversion scripts by which the files were made (huggingface/transformers, src/transformers/models). The
names that siglip/convert_siglip_to_hf.py, siglip2/convert_siglip2_to_hf.py, dinov2/convert_dinov2_to_hf.py,
dinov2_with_registers/convert_dinov2_with_registers_to_hf.py and clip/convert_clip_original_pytorch_to_hf.py write; for AIMv2
those that aimv2/convert_aimv2_original_pytorch_to_hf.py reads, which are the ones in Apple's files. Fields of config.json: the
same scripts, and copies of the files quoted in public repositories. The files themselves were not at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


def clip_layers(prefix: str, width: int, mlp: int, layers: int) -> Shapes:
    """The blocks that CLIP, SigLIP and SigLIP 2 share, of the image and of the text side."""
    shapes: Shapes = {}
    for i in range(layers):
        block = f"{prefix}.encoder.layers.{i}"
        shapes |= norm(f"{block}.layer_norm1", width) | norm(f"{block}.layer_norm2", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{projection}", width, width)
        shapes |= linear(f"{block}.mlp.fc1", mlp, width) | linear(f"{block}.mlp.fc2", width, mlp)
    return shapes


def siglip_file(
    width: int,
    mlp: int,
    layers: int,
    patch: int,
    positions: int,
    *,
    words: int,
    text_positions: int,
    flat_patches: bool = False,
) -> Shapes:
    """A whole two-tower model, as google/siglip-* and google/siglip2-*."""
    image, text = "vision_model", "text_model"
    patch_weight = (width, 3 * patch * patch) if flat_patches else (width, 3, patch, patch)
    return {
        "logit_scale": (1,),
        "logit_bias": (1,),
        f"{image}.embeddings.patch_embedding.weight": patch_weight,
        f"{image}.embeddings.patch_embedding.bias": (width,),
        f"{image}.embeddings.position_embedding.weight": (positions, width),
        **clip_layers(image, width, mlp, layers),
        **norm(f"{image}.post_layernorm", width),
        f"{image}.head.probe": (1, 1, width),
        f"{image}.head.attention.in_proj_weight": (3 * width, width),
        f"{image}.head.attention.in_proj_bias": (3 * width,),
        **linear(f"{image}.head.attention.out_proj", width, width),
        **norm(f"{image}.head.layernorm", width),
        **linear(f"{image}.head.mlp.fc1", mlp, width),
        **linear(f"{image}.head.mlp.fc2", width, mlp),
        f"{text}.embeddings.token_embedding.weight": (words, width),
        f"{text}.embeddings.position_embedding.weight": (text_positions, width),
        **clip_layers(text, width, mlp, layers),
        **norm(f"{text}.final_layer_norm", width),
        **linear(f"{text}.head", width, width),
    }


def clip_file(layers: int, *, position_ids: bool) -> Shapes:
    """openai/clip-vit-large-patch14-336; files of before 2023 have the two index buffers."""
    width, mlp, positions, text_width, text_layers = 1024, 4096, 577, 768, min(12, layers)
    buffers = {"vision_model.embeddings.position_ids": (1, positions), "text_model.embeddings.position_ids": (1, 77)}
    return {
        "logit_scale": (),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (positions, width),
        **norm("vision_model.pre_layrnorm", width),
        **clip_layers("vision_model", width, mlp, layers),
        **norm("vision_model.post_layernorm", width),
        "text_model.embeddings.token_embedding.weight": (49408, text_width),
        "text_model.embeddings.position_embedding.weight": (77, text_width),
        **clip_layers("text_model", text_width, 3072, text_layers),
        **norm("text_model.final_layer_norm", text_width),
        "visual_projection.weight": (768, width),
        "text_projection.weight": (768, text_width),
        **(buffers if position_ids else {}),
    }


def dinov2_file(layers: int, *, registers: int = 0) -> Shapes:
    width, mlp = 1024, 4096
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 1370, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **({"embeddings.register_tokens": (1, registers, width)} if registers else {}),
    }
    for i in range(layers):
        block = f"encoder.layer.{i}"
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        for projection in ("query", "key", "value"):
            shapes |= linear(f"{block}.attention.attention.{projection}", width, width)
        shapes |= linear(f"{block}.attention.output.dense", width, width)
        shapes |= {f"{block}.layer_scale1.lambda1": (width,), f"{block}.layer_scale2.lambda1": (width,)}
        shapes |= linear(f"{block}.mlp.fc1", mlp, width) | linear(f"{block}.mlp.fc2", width, mlp)
    return shapes | norm("layernorm", width)


def aimv2_file(layers: int) -> Shapes:
    width, mlp = 1024, 2816
    shapes: Shapes = {
        "preprocessor.pos_embed": (1, 576, width),
        **linear("preprocessor.patchifier.proj", width, 0),
        **norm("preprocessor.patchifier.norm", width, bias=False),
        **norm("trunk.post_trunk_norm", width, bias=False),
    }
    shapes["preprocessor.patchifier.proj.weight"] = (width, 3, 14, 14)
    for i in range(layers):
        block = f"trunk.blocks.{i}"
        shapes |= norm(f"{block}.norm_1", width, bias=False) | norm(f"{block}.norm_2", width, bias=False)
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width, bias=False)
        shapes |= linear(f"{block}.attn.proj", width, width, bias=False)
        shapes |= linear(f"{block}.mlp.fc1", mlp, width, bias=False) | linear(f"{block}.mlp.fc3", mlp, width, bias=False)
        shapes |= linear(f"{block}.mlp.fc2", width, mlp, bias=False)
    return shapes


def llama_file(config: dict[str, Any], layers: int) -> Shapes:
    """Qwen2.5, Qwen3 and SmolLM2."""
    width, mlp, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (words, width)
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.input_layernorm.weight": (width,), f"{block}.post_attention_layernorm.weight": (width,)}
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            shapes |= linear(f"{block}.self_attn.{name}_proj", outputs, width, bias=config["model_type"] == "qwen2")
        shapes |= linear(f"{block}.self_attn.o_proj", width, queries, bias=False)
        if config["model_type"] == "qwen3":
            shapes |= {f"{block}.self_attn.q_norm.weight": (head,), f"{block}.self_attn.k_norm.weight": (head,)}
        for name in ("gate", "up"):
            shapes |= linear(f"{block}.mlp.{name}_proj", mlp, width, bias=False)
        shapes |= linear(f"{block}.mlp.down_proj", width, mlp, bias=False)
    return shapes


@dataclass(frozen=True)
class PublicFile:
    hub: str
    config: dict[str, Any]
    layers: int
    shapes: Callable[[int], Shapes]
    """Of the file with so many layers."""
    million_parameters: float
    """Of the tower as VisionEncoder keeps it, without what CoMP drops, or of the language model."""


def siglip_config(side: int, **vision: Any) -> dict[str, Any]:
    """Fields at the defaults of their class are not in these files."""
    return {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **{k: v for k, v in vision.items() if k != "patch_size"}},
        "torch_dtype": "float32",
        "transformers_version": "4.37.0.dev0",
        "vision_config": {"image_size": side, "model_type": "siglip_vision_model", **vision},
    }


def siglip(hub: str, side: int, words: int, million_parameters: float, **vision: Any) -> PublicFile:
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, patch_size=16) | vision
    width, mlp, patch = sizes["hidden_size"], sizes["intermediate_size"], sizes["patch_size"]

    def shapes(layers: int) -> Shapes:
        return siglip_file(width, mlp, layers, patch, (side // patch) ** 2, words=words, text_positions=64)

    return PublicFile(hub, siglip_config(side, **vision), sizes["num_hidden_layers"], shapes, million_parameters)


SO400M = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27)
DINOV2_LARGE = {
    "architectures": ["Dinov2Model"],
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 1024,
    "image_size": 518,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-06,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "model_type": "dinov2",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "qkv_bias": True,
    "torch_dtype": "float32",
    "transformers_version": "4.31.0.dev0",
    "use_swiglu_ffn": False,
}
CLIP_LARGE_336 = {
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "torch_dtype": "float32",
    "vision_config": {  # without model_type, as older files of the family are
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}

TOWER_FILES = [
    siglip("google/siglip-so400m-patch14-384", 384, 32000, 413.0, **SO400M, patch_size=14),
    siglip("google/siglip-base-patch16-384", 384, 32000, 86.1),
    siglip("google/siglip2-so400m-patch14-384", 384, 256000, 413.0, **SO400M, patch_size=14),
    PublicFile(
        "google/siglip2-so400m-patch16-naflex",
        {
            "architectures": ["Siglip2Model"],
            "initializer_factor": 1.0,
            "model_type": "siglip2",
            "text_config": {"model_type": "siglip2_text_model", "vocab_size": 256000, **SO400M},
            "torch_dtype": "float32",
            "transformers_version": "4.49.0.dev0",
            "vision_config": {"model_type": "siglip2_vision_model", "num_patches": 256, "patch_size": 16, **SO400M},
        },
        27,
        lambda layers: siglip_file(1152, 4304, layers, 16, 256, words=256000, text_positions=64, flat_patches=True),
        412.6,
    ),
    PublicFile("facebook/dinov2-large", DINOV2_LARGE, 24, dinov2_file, 304.4),
    PublicFile(
        "facebook/dinov2-with-registers-large",
        {
            **DINOV2_LARGE,
            "architectures": ["Dinov2WithRegistersModel"],
            "model_type": "dinov2_with_registers",
            "num_register_tokens": 4,
        },
        24,
        lambda layers: dinov2_file(layers, registers=4),
        304.4,
    ),
    PublicFile(
        "apple/aimv2-large-patch14-336",
        {
            "architectures": ["AIMv2Model"],
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_aimv2.AIMv2Config",
                "AutoModel": "modeling_aimv2.AIMv2Model",
                "FlaxAutoModel": "modeling_flax_aimv2.FlaxAIMv2Model",
            },
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 2816,
            "model_type": "aimv2",
            "num_attention_heads": 8,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dropout": 0.0,
            "qkv_bias": False,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float32",
            "use_bias": False,
        },
        24,
        aimv2_file,
        309.5,
    ),
    PublicFile(
        "openai/clip-vit-large-patch14-336", CLIP_LARGE_336, 24, lambda layers: clip_file(layers, position_ids=True), 303.5
    ),
]


def language_file(hub: str, million_parameters: float, config: dict[str, Any]) -> PublicFile:
    return PublicFile(hub, config, config["num_hidden_layers"], partial(llama_file, config), million_parameters)


def qwen2(width: int, mlp: int, layers: int, heads: int, key_heads: int, positions: int, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": positions,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": positions,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        **fields,
    }


INSTRUCTED = dict(eos_token_id=151645, max_window_layers=21, tie_word_embeddings=True, vocab_size=151936)
BASE = dict(eos_token_id=151643, max_window_layers=28, tie_word_embeddings=False, vocab_size=152064, use_mrope=False)
LANGUAGE_FILES = [
    language_file("Qwen/Qwen2.5-0.5B-Instruct", 494.0, qwen2(896, 4864, 24, 14, 2, positions=32768, **INSTRUCTED)),
    language_file("Qwen/Qwen2.5-7B", 7615.6, qwen2(3584, 18944, 28, 28, 4, positions=131072, **BASE)),
    language_file(
        "Qwen/Qwen3-0.6B",
        596.0,
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    language_file(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134.5,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 49152,
        },
    ),
]


def with_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """config.json of the same file with fewer layers."""
    changed = {**config}
    for part in ("vision_config", "text_config"):
        if part in changed:
            changed[part] = {**changed[part], "num_hidden_layers": layers}
    return changed if "vision_config" in changed else {**changed, "num_hidden_layers": layers}
