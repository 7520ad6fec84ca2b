"""Weights on disk <-> the parameters of a VisionEncoder: names of every tower family, strict both ways, CoMP's own included.

Each of our parameters is made of one or several tensors of a family's file (q, k and v become one matrix). Three also change
form: the patch convolution becomes a matrix, the position table a [G, G, D] grid, CLS and registers one [prefix, D] matrix.
What we write has our own names, those of modeling_comp.py, which stands beside it; `write_transformers_tower` has the family's.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS, TowerChoices, field_types
from ..files import write_json
from .folder import open_weights, read_object, weight_files
from .vit_config import ViTConfig

MODELING_FILE = Path(__file__).with_name("modeling_comp.py")
"""Goes with every model that is written: transformers runs it."""
MODEL_TYPE = "comp_vision"
AUTO_CLASSES = {"AutoConfig": "CompVisionConfig", "AutoModel": "CompVisionModel"}
# Fields of ViTConfig that config.json kept under "comp" when towers were written in their families' names.
STORED = (*field_types(TowerChoices), "rope_base", "image_mean", "image_std")


@dataclass(frozen=True)
class Names:
    """Names of one family on disk; `{i}` is the block number. Ours are the keys of `fixed` and `block`, without the suffix."""

    table: str
    fixed: dict[str, str]
    block: Mapping[str, tuple[str, ...] | str]
    cls_token: str | None = None
    registers: str | None = None
    batched: bool = False
    """The table and the tokens have a leading dimension of one."""

    def sources(self, ours: str) -> list[str]:
        """The names on disk that our parameter (weight or bias of a module, or a scale) is concatenated from."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", ours)
        table, key = (self.block, match[2]) if match else (self.fixed, ours)
        module, _, suffix = key.rpartition(".")
        theirs, suffix = (table[key], "") if key in table else (table[module], f".{suffix}")
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        return [name.format(i=match[1] if match else "") + suffix for name in theirs]


CLIP_BLOCK: dict[str, tuple[str, ...] | str] = {
    "norm1": "encoder.layers.{i}.layer_norm1",
    "attn.qkv": tuple(f"encoder.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"),
    "attn.proj": "encoder.layers.{i}.self_attn.out_proj",
    "norm2": "encoder.layers.{i}.layer_norm2",
    "mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "mlp.fc2": "encoder.layers.{i}.mlp.fc2",
}
ADAPTER = {"adapter.norm": "merger.ln_q", "adapter.fc1": "merger.mlp.0", "adapter.fc2": "merger.mlp.2"}
SIGLIP = Names(
    table="embeddings.position_embedding.weight",
    fixed={"patch_embed": "embeddings.patch_embedding", "norm": "post_layernorm", **ADAPTER},
    block=CLIP_BLOCK,
)
CLIP = Names(
    table=SIGLIP.table,
    fixed={**SIGLIP.fixed, "pre_norm": "pre_layrnorm"},  # the library's spelling
    block=CLIP_BLOCK,
    cls_token="embeddings.class_embedding",
)
DINOV2 = Names(
    table="embeddings.position_embeddings",
    fixed={"patch_embed": "embeddings.patch_embeddings.projection", "norm": "layernorm", **ADAPTER},
    block={
        "norm1": "encoder.layer.{i}.norm1",
        "attn.qkv": tuple(f"encoder.layer.{{i}}.attention.attention.{x}" for x in ("query", "key", "value")),
        "attn.proj": "encoder.layer.{i}.attention.output.dense",
        "scale1": "encoder.layer.{i}.layer_scale1.lambda1",
        "norm2": "encoder.layer.{i}.norm2",
        "mlp.fc1": "encoder.layer.{i}.mlp.fc1",
        "mlp.fc2": "encoder.layer.{i}.mlp.fc2",
        "mlp.gate_up": "encoder.layer.{i}.mlp.weights_in",
        "mlp.down": "encoder.layer.{i}.mlp.weights_out",
        "scale2": "encoder.layer.{i}.layer_scale2.lambda1",
    },
    cls_token="embeddings.cls_token",
    registers="embeddings.register_tokens",
    batched=True,
)
AIMV2 = Names(
    table=SIGLIP.table,
    fixed={"patch_embed": "embeddings.patch_embed", "embed_norm": "embeddings.rms_norm", "norm": "rms_norm", **ADAPTER},
    block={
        "norm1": "encoder.layers.{i}.rms_norm1",
        "attn.qkv": tuple(f"encoder.layers.{{i}}.attention.{x}_proj" for x in "qkv"),
        "attn.proj": "encoder.layers.{i}.attention.out_proj",
        "norm2": "encoder.layers.{i}.rms_norm2",
        "mlp.gate_up": ("encoder.layers.{i}.ffn.gate_proj", "encoder.layers.{i}.ffn.up_proj"),
        "mlp.down": "encoder.layers.{i}.ffn.down_proj",
    },
)
AIMV2_ORIGINAL = Names(
    table="preprocessor.pos_embed",
    fixed={
        "patch_embed": "preprocessor.patchifier.proj",
        "embed_norm": "preprocessor.patchifier.norm",
        "norm": "trunk.post_trunk_norm",
        **ADAPTER,
    },
    block={
        "norm1": "trunk.blocks.{i}.norm_1",
        "attn.qkv": "trunk.blocks.{i}.attn.qkv",
        "attn.proj": "trunk.blocks.{i}.attn.proj",
        "norm2": "trunk.blocks.{i}.norm_2",
        "mlp.gate_up": ("trunk.blocks.{i}.mlp.fc1", "trunk.blocks.{i}.mlp.fc3"),
        "mlp.down": "trunk.blocks.{i}.mlp.fc2",
    },
    batched=True,
)
FAMILIES = {
    "siglip": SIGLIP,
    "siglip2": SIGLIP,
    "clip": CLIP,
    "dinov2": DINOV2,
    "aimv2": AIMV2,
    "aimv2_original": AIMV2_ORIGINAL,
}

# What a file may hold beside the tower, left out on purpose. Patterns for names after the tower's prefix is taken off.
DROPPED = (
    r"head\..*",  # attention-pooling heads of SigLIP and AIMv2
    r"post_layernorm\..*",  # norm of the pooled output (SigLIP, CLIP); kept with final_norm=True
    r"embeddings\.(mask_token|cls_token|class_embedding|register_tokens)",  # prefix tokens: keep_prefix_tokens=True
    r"embeddings\.position_ids",  # an index buffer of older files
    r"(text_model|visual_projection|text_projection|classifier)\..*",  # the rest of a two-tower model or classifier
    r"logit_(scale|bias)",
)
OWN_DROPPED = (
    r"prefix_tokens",
    r"norm\..*",
)  # of a file in our own names: what keep_prefix_tokens, final_norm = False leave out
PREFIXES = (
    "vision_model.",
    "dinov2.",
    "dinov2_with_registers.",
    "visual.vision_model.",
    "visual.",
)  # of the tower inside a larger model


@dataclass
class Checkpoint:
    """What a directory holds; tensors are read one by one, and which ones is remembered."""

    config: dict[str, Any]
    files: dict[str, Any]
    """Name of each tensor -> the tensor, or the open safetensors file that has it."""
    statistics: dict[str, list[float]]
    """image_mean and image_std, where there is a preprocessor_config.json."""
    read: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: str | os.PathLike) -> Checkpoint:
        directory = Path(path)
        if not directory.is_dir():
            directory = fetch(str(path))
        if not (directory / "config.json").is_file():
            names = sorted(os.listdir(directory))
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            raise ValueError(f"path must hold a config.json, {directory} has {names[:10]}{more}")
        config = read_object(directory / "config.json")
        if config.get("model_type") == "comp":  # a whole model of ours: the tower is a folder of its own
            return cls.open(directory / "vision")
        statistics = {}
        if (directory / "preprocessor_config.json").is_file():
            settings = read_object(directory / "preprocessor_config.json")
            statistics = {key: settings[key] for key in ("image_mean", "image_std") if settings.get(key)}
        tensors: dict[str, Any] = {}
        for weights in weight_files(directory):
            held = open_weights(weights)
            if twice := sorted(held.keys() & tensors.keys()):
                raise ValueError(f"{weights} holds {twice[:3]}, which another file of the same checkpoint holds as well")
            tensors |= held
        return cls(config, tensors, statistics)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def get(self, name: str) -> Tensor:
        self.read.add(name)
        held = self.files[name]
        tensor = held if isinstance(held, Tensor) else held.get_tensor(name)
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of floating-point numbers, got {tensor.dtype}")
        return tensor

    @property
    def is_own(self) -> bool:
        """Written by `write_tower`, in our own names."""
        return self.config.get("model_type") == MODEL_TYPE

    @property
    def tower_prefix(self) -> str:
        if self.is_own:
            return ""
        return next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in self.files)), "")

    @property
    def has_adapter(self) -> bool:
        return any(re.match(r"(visual\.)?merger\.", name) for name in self.files)

    def merger_name(self, name: str) -> str:
        """Where a weight of the adapter stands: beside the tower, at the top, or under visual. in a whole CoMP-MM."""
        return name if name in self or not self.tower_prefix.startswith("visual.") else "visual." + name

    @property
    def adapter_width(self) -> int | None:
        """Width of the adapter's output, None without an adapter; 1 where the file lacks the weight that says it."""
        if self.is_own:
            return self.config.get("adapter_width")
        name = self.merger_name("merger.mlp.2.weight")
        if name not in self:
            return 1 if self.has_adapter else None
        held = self.files[name]
        return (held.shape if isinstance(held, Tensor) else held.get_slice(name).get_shape())[0]

    @property
    def is_released_comp(self) -> bool:
        """A checkpoint of the released CoMP code: it has a flag `use_rope` or an adapter, and not our "comp" section."""
        settings = {**self.config, **(self.config.get("vision_config") or {})}
        return "comp" not in settings and ("use_rope" in settings or self.has_adapter)


def fetch(hub_id: str) -> Path:
    """The folder of a repository of the hub: its weights as safetensors, or pickled where it has no others; not both."""
    from huggingface_hub import snapshot_download

    for names in (("model*.safetensors", "vision/model*.safetensors"), ("pytorch_model*.bin",)):
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", *names]))
        if any(file for name in names for file in folder.glob(name)):
            break
    return folder


def tower_config(checkpoint: Checkpoint, choices: dict[str, Any], path: str | os.PathLike) -> ViTConfig:
    """The tower's configuration with the caller's choices (fields of TowerChoices; None leaves the checkpoint's own).

    ValueError with path and cause for what is no such thing.
    """
    stored = checkpoint.config.get("comp", {})
    if not isinstance(stored, dict) or (unknown := sorted(stored.keys() - set(STORED))):
        got = f"unknown {unknown}" if isinstance(stored, dict) else repr(stored)
        raise ValueError(f'{path}/config.json: "comp" must hold fields of {", ".join(STORED)}; got {got}')
    given = {name: value for name, value in choices.items() if value is not None}
    try:
        return ViTConfig.from_hugging_face(checkpoint.config, **with_stored_choices(checkpoint, given, path))
    except ValueError as error:
        raise ValueError(f"{path}/config.json: {error}") from error
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:  # a value of another type than the field's
        raise ValueError(f"{path}/config.json does not describe a vision tower: {type(error).__name__}: {error}") from error


def with_stored_choices(checkpoint: Checkpoint, given: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """The caller's choices, completed by those in the checkpoint and, for released CoMP checkpoints, by what they need."""
    if checkpoint.is_own:
        return given
    if not checkpoint.is_released_comp:
        return {**checkpoint.statistics, **checkpoint.config.get("comp", {}), **given}
    settings = {**checkpoint.config, **(checkpoint.config.get("vision_config") or {})}
    needed = {
        "pos_mode": "abs+rope" if settings.get("use_rope", True) else "abs",
        "abs_pos_order": "raster_legacy",
        "merge_size": settings.get("spatial_merge_size") or 2,
    }
    if "abs_pos_order" not in given:
        warnings.warn(
            f"{path} is a checkpoint of the released CoMP code, which added the position table in raster order to patches in "
            'merge-block order: using abs_pos_order="raster_legacy". Pass abs_pos_order to choose, or save_pretrained to '
            "store the choice.",
            stacklevel=5,
        )
    return {**checkpoint.statistics, **needed, **given}


def read_tensors(
    checkpoint: Checkpoint, config: ViTConfig, shapes: dict[str, torch.Size], path: str | os.PathLike
) -> dict[str, Tensor]:
    """Our parameters from the file's; raises ValueError that lists what is missing, what is unexpected, what does not fit."""
    names, prefix = FAMILIES[config.family], checkpoint.tower_prefix
    missing, tensors = [], {}

    def tensor_or_none(name: str) -> Tensor | None:
        name = checkpoint.merger_name(name) if name.startswith("merger.") else prefix + name
        if name in checkpoint:
            try:
                return checkpoint.get(name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        missing.append(name)
        return None

    for ours, shape in shapes.items():
        if checkpoint.is_own:
            parts = [tensor_or_none(ours)]
        elif ours == "pos_embed":
            parts = [tensor_or_none(names.table)]
        elif ours == "prefix_tokens":
            tokens = (names.cls_token, names.registers if config.num_prefix_tokens > 1 else None)
            parts = [tensor_or_none(name) for name in (*tokens, names.table) if name is not None]
        else:
            parts = [tensor_or_none(name) for name in names.sources(ours)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            continue
        tensor = found[0] if checkpoint.is_own else to_ours(ours, found, config)
        tensors[ours] = tensor.clone()  # the file stays mapped: own the memory
        if tensors[ours].shape != shape:
            raise ValueError(
                f"{path}: {ours} must be {tuple(shape)} by config.json, the file has {[tuple(part.shape) for part in found]}"
            )

    dropped = OWN_DROPPED if checkpoint.is_own else DROPPED
    unexpected = [name for name in checkpoint.files if name not in checkpoint.read and not is_dropped(name, prefix, dropped)]
    if missing or unexpected:
        raise ValueError(
            f"{path}: the weights do not fit a {config.family} tower. Missing: {sorted(missing) or 'none'}. "
            f"Unexpected: {sorted(unexpected) or 'none'}"
        )
    return tensors


def is_dropped(name: str, prefix: str, patterns: Sequence[str] = DROPPED) -> bool:
    if prefix.startswith("visual.") and name.startswith(("model.", "lm_head.")):  # the language model of a CoMP-MM checkpoint
        return True
    return any(re.fullmatch(pattern, candidate) for pattern in patterns for candidate in {name, name.removeprefix(prefix)})


def to_ours(ours: str, parts: list[Tensor], config: ViTConfig) -> Tensor:
    """One of our parameters from the tensors it is made of."""
    if ours == "patch_embed.weight":
        weight = parts[0]
        if config.family == "siglip2":  # a Linear over patches that were flattened as (row, column, channel)
            weight = weight.unflatten(1, (config.patch_size, config.patch_size, config.num_channels)).permute(0, 3, 1, 2)
        return weight.flatten(1)
    if ours == "pos_embed":
        table = parts[0].view(-1, config.width)
        side = config.grid_size
        return table[len(table) - side * side :].reshape(-1, side, config.width)
    if ours == "prefix_tokens":
        *rows, table = (part.view(-1, config.width) for part in parts)
        tokens = torch.cat(rows)
        tokens[0] += table[0]
        return tokens
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def to_theirs(config: ViTConfig, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's parameters under the family's names: the inverse of reading, with CLS's table entry as zeros."""
    names = FAMILIES[config.family]
    state = {name: tensor.detach() for name, tensor in parameters.items()}
    theirs: dict[str, Tensor] = {}
    if "prefix_tokens" in state:
        assert names.cls_token is not None  # else from_hugging_face counts no prefix tokens
        tokens = state.pop("prefix_tokens")
        cls_shape = (1, 1, config.width) if names.batched else (config.width,)
        theirs[names.cls_token] = tokens[0].view(cls_shape)
        if names.registers and len(tokens) > 1:
            theirs[names.registers] = tokens[1:].unsqueeze(0)
    if "pos_embed" in state:
        table = state.pop("pos_embed").flatten(0, 1)
        if names.cls_token:
            table = torch.cat((table.new_zeros(1, config.width), table))
        theirs[names.table] = table.unsqueeze(0) if names.batched else table
    for ours, tensor in state.items():
        if ours == "patch_embed.weight":
            weight = tensor.unflatten(1, (config.num_channels, config.patch_size, config.patch_size))
            tensor = weight.permute(0, 2, 3, 1).flatten(1) if config.family == "siglip2" else weight
        sources = names.sources(ours)
        theirs.update(zip(sources, tensor.chunk(len(sources))))
    return {name: tensor.cpu().contiguous() for name, tensor in theirs.items()}


def write_tower(path: str | os.PathLike, config: ViTConfig, parameters: dict[str, Tensor]) -> None:
    """config.json, preprocessor_config.json and model.safetensors in our own names, and modeling_comp.py, which runs them with
    torch and transformers alone."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    written = dict(
        model_type=MODEL_TYPE,
        architectures=["CompVisionModel"],
        auto_map={name: f"{MODELING_FILE.stem}.{cls}" for name, cls in AUTO_CLASSES.items()},
        dtype=str(state["patch_embed.weight"].dtype).removeprefix("torch."),
        adapter_width=len(state["adapter.fc2.bias"]) if "adapter.fc2.bias" in state else None,
        **asdict(config),
    )
    write_json(directory / "config.json", written)
    write_json(directory / "preprocessor_config.json", image_processor(config))
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)


def image_processor(config: ViTConfig, *, max_tokens: int = MAX_VISUAL_TOKENS) -> dict[str, Any]:
    """preprocessor_config.json: transformers' image processor of Qwen2-VL makes the same patches in the same order."""
    block = (config.patch_size * config.merge_size) ** 2
    return dict(
        image_processor_type="Qwen2VLImageProcessor",
        patch_size=config.patch_size,
        temporal_patch_size=1,
        merge_size=config.merge_size,
        size=dict(shortest_edge=MIN_VISUAL_TOKENS * block, longest_edge=max_tokens * block),  # areas, in pixels
        resample=3,  # bicubic
        image_mean=config.image_mean,
        image_std=config.image_std,
    )


def write_transformers_tower(path: str | os.PathLike, config: ViTConfig, parameters: dict[str, Tensor]) -> None:
    """config.json and model.safetensors of the family's own class in transformers, without an adapter. ValueError where the
    tower is not what that class computes."""
    if config.family == "aimv2_original":
        config = replace(config, family="aimv2", hugging_face=aimv2_configuration(config))
    names = FAMILIES[config.family]
    kept = dict(pos_mode="abs", abs_pos_order="merge", final_norm=True)
    if names.cls_token:
        kept["keep_prefix_tokens"] = True
    other = [
        f"{name}={getattr(config, name)!r} (needs {value!r})" for name, value in kept.items() if getattr(config, name) != value
    ]
    if config.family == "aimv2" and config.proj_bias != config.qkv_bias:
        other.append(f"proj_bias={config.proj_bias} (needs that of q, k and v)")
    if other:
        raise ValueError(f"transformers has no {config.family} class for this tower: {', '.join(other)}; use save_pretrained")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tower = {name: tensor for name, tensor in parameters.items() if not name.startswith("adapter.")}
    tensors = to_theirs(config, tower)
    if config.family == "dinov2":  # of masked pre-training; the classes want it
        tensors["embeddings.mask_token"] = torch.zeros(1, config.width, dtype=tensors[names.table].dtype)
    without_heads = {"siglip": "vision_use_head", "siglip2": "vision_use_head", "aimv2": "use_head"}
    head = {without_heads[config.family]: False} if config.family in without_heads else {}
    write_json(directory / "config.json", {**config.hugging_face, **head})
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def aimv2_configuration(config: ViTConfig) -> dict[str, Any]:
    """config.json of transformers' Aimv2VisionModel for a tower in Apple's own layout."""
    return dict(
        model_type="aimv2_vision_model",
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_width,
        patch_size=config.patch_size,
        image_size=config.grid_size * config.patch_size,
        num_channels=config.num_channels,
        hidden_act=config.activation,
        rms_norm_eps=config.norm_eps,
        qkv_bias=config.qkv_bias,
        mlp_bias=config.mlp_bias,
        is_native=config.sincos_table,
    )
