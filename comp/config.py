"""The configuration of a run: plain dataclasses that validate themselves.

A recipe (`comp.recipes`) is a function that returns a whole `Config`; a stage is data. `comp.config_io` reads, writes and
changes configurations by field names.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PARTS = ("vision", "adapter", "language")
BEFORE = "before"
"""What results before the first stage are called; no stage may be."""

MAX_PIXELS = 64_000_000
"""The largest picture that is decoded unless a setting says otherwise: A4 at 800 dpi, 0.5 to 1 GB while it is read."""
PILLOW_MAX_PIXELS = 178_956_970
"""Pillow itself opens nothing larger."""

MIN_VISUAL_TOKENS, MAX_VISUAL_TOKENS = 4, 3000
"""Of one sample, unless a setting says otherwise; the larger as in the paper's native stages (arXiv 2503.18931v2, Table 11)."""

PosMode = Literal["abs", "rope", "abs+rope"]
AbsPosOrder = Literal["merge", "raster_legacy"]
AbsPosInterp = Literal["bicubic", "bilinear"]
RopeDtype = Literal["fp32", "bf16_legacy"]
AdapterInit = Literal["lecun", "truncated"]
PositionIds = Literal["mrope", "1d"]
PrototypeSource = Literal["embed_tokens", "lm_head", "frozen", "learned"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, what it holds and what it needs."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def need_choice(name: str, value: object, choices: Sequence[object]) -> None:
    need(value in choices, f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def alternatives(kind: Any) -> tuple[Any, ...]:
    """`X | Y | None` -> (X, Y, NoneType); any other type -> (type,)."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


@functools.cache
def field_types(cls: type[DataclassInstance]) -> dict[str, Any]:
    """The annotations of a dataclass, by field."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def need_literals(settings: DataclassInstance, owner: str = "") -> None:
    """Fields annotated `Literal[...]` hold one of its values; `owner` comes before the name in the message."""
    for name, kind in field_types(type(settings)).items():
        literals = [k for k in alternatives(kind) if typing.get_origin(k) is Literal]
        if literals:
            choices = [value for k in literals for value in typing.get_args(k)]
            optional = [None] if types.NoneType in alternatives(kind) else []
            need_choice(f"{owner}{name}", getattr(settings, name), (*optional, *choices))


def need_finite(settings: DataclassInstance, owner: str = "", but: Sequence[str] = ()) -> None:
    """No field holds an infinite number or NaN, except infinity in those named in `but`."""
    for name in field_types(type(settings)):
        value = getattr(settings, name)
        fits = not isinstance(value, float) or math.isfinite(value) or (name in but and not math.isnan(value))
        need(fits, f"{owner}{name} must be a finite number, got {value}")


@dataclass(kw_only=True, slots=True)
class TowerChoices:
    """What a user may choose about a vision tower; None: what its checkpoint needs or was trained with."""

    pos_mode: PosMode | None = None
    """"abs": position table; "rope": 2D rotary embedding; "abs+rope": both, CoMP's C-RoPE."""
    abs_pos_order: AbsPosOrder | None = None
    """"merge": each patch gets the table entry of its place. "raster_legacy": the released CoMP code, where the table is in
    raster order while patches are in merge-block order; checkpoints trained that way need it."""
    abs_pos_interp: AbsPosInterp | None = None
    """How the table is resampled to the grid of an image: "bicubic" (released code) or "bilinear" (paper)."""
    align_corners: bool | None = None
    """Of that resampling, as in torch.nn.functional.interpolate; not together with `antialias`."""
    antialias: bool | None = None
    """Of that resampling, as in torch.nn.functional.interpolate; with "bicubic" it is another cubic, in enlargements too."""
    rope_dtype: RopeDtype | None = None
    """"fp32", or "bf16_legacy": positions, frequencies and angles rounded to bfloat16, as casting the released code does."""
    keep_prefix_tokens: bool | None = None
    """Keep CLS and registers: same attention segment, no rotation, no table entry, stripped from the output."""
    final_norm: bool | None = None
    """Keep the norm after the last block. Off by default for SigLIP (as in CoMP) and CLIP (it belongs to the CLS output)."""
    merge_size: int | None = None
    """Patches come in blocks of merge_size x merge_size, of which the adapter makes one token."""


@dataclass(kw_only=True, slots=True)
class LoRAConfig:
    """Low-rank updates of a part's matrices, trained in place of all its parameters; needs the extra "lora" (peft)."""

    rank: int = 16
    alpha: float = 32.0
    """Updates are scaled by alpha / rank."""
    dropout: float = 0.0
    """On the input of an update."""
    targets: tuple[str, ...] = ()
    """Last parts of the names of the matrices: q_proj, v_proj of a language model, qkv, proj of a tower, ...; none: all of the
    blocks."""

    def __post_init__(self) -> None:
        need_finite(self, "lora.")
        need(self.rank > 0, f"lora.rank must be positive, got {self.rank}")
        need(self.alpha > 0, f"lora.alpha must be positive, got {self.alpha}")
        need(0 <= self.dropout < 1, f"lora.dropout must lie in [0, 1), got {self.dropout}")


@dataclass(kw_only=True, slots=True)
class VisionConfig(TowerChoices):
    """The pre-trained vision tower."""

    path: str
    """Directory with config.json and model.safetensors in Hugging Face layout, or a hub id."""
    pos_mode: PosMode = "abs+rope"
    """Position signal while a stage has `rope` on: "abs+rope" (CoMP) or "rope". Stages with `rope` off use "abs"."""
    pretrain_resolution: int | None = None
    """Side in pixels of the images the tower was pre-trained on; None: what its position table covers."""
    adapter_init: AdapterInit = "lecun"
    """Weights of a new adapter: "lecun" or "truncated" (`comp.model.Adapter`)."""
    lora: LoRAConfig | None = None
    """Train low-rank updates of the tower; null: all of it."""

    def __post_init__(self) -> None:
        need(self.path != "", "vision.path must name a folder or a hub id, got ''")
        need_literals(self, "vision.")
        need(
            not (self.align_corners and self.antialias),
            "vision.align_corners and vision.antialias cannot be combined: antialiased resampling has no aligned corners",
        )
        for name in ("merge_size", "pretrain_resolution"):
            value = getattr(self, name)
            need(value is None or value > 0, f"vision.{name} must be positive or null, got {value}")

    def choices(self) -> dict[str, Any]:
        """What to load the tower with: the fields of TowerChoices that say something, but pos_mode, which stages switch."""
        values = {name: getattr(self, name) for name in field_types(TowerChoices) if name != "pos_mode"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True, slots=True)
class LanguageConfig:
    """The pre-trained language model."""

    path: str
    """Directory of a transformers causal language model with its tokenizer, or a hub id."""
    tokenizer: str | None = None
    """Directory of the tokenizer where it is not beside the model."""
    position_ids: PositionIds = "mrope"
    """"mrope": image tokens carry (time, row, column), as Qwen2-VL; "1d": plain running index."""
    attention: str | None = None
    """Attention by its name in transformers ("sdpa", "eager", "flash_attention_2", "flex_attention", ...); null: its choice for
    the model."""
    pack_rows: bool = True
    """Put the rows of a forward pass behind each other instead of padding them, where the model keeps them apart
    (`comp.model.packed_rows`); where it does not, the run says why and pads. The losses are the same up to rounding."""
    liger: bool = False
    """Liger's RMSNorm and SwiGLU in the model, from the package liger-kernel; needs a GPU. Its fused cross-entropy is used on
    GPUs wherever the package is installed."""
    lora: LoRAConfig | None = None
    """Train low-rank updates of the language model; null: all of it."""

    def __post_init__(self) -> None:
        need(self.path != "", "language.path must name a folder or a hub id, got ''")
        need_literals(self, "language.")


@dataclass(kw_only=True, slots=True)
class AlignmentConfig:
    """The alignment loss of a stage (`comp_kernels.alignment_loss`)."""

    weight: float = 0.05
    """alpha of arXiv 2503.18931v2, Eq. 11."""
    mode: Literal["sinkhorn", "literal", "released", "softmax", "contrastive"] = "sinkhorn"
    """How the target distribution is made; formulas in `comp_kernels.alignment_loss`. "contrastive" has no distribution over
    words: images pick their texts (`comp.model.losses.contrastive_loss`); of the fields below `temperature` alone counts."""
    epsilon: float = 0.005
    """Temperature of the text scores; v2 appendix C: "all temperature coefficients are 0.005"."""
    temperature: float = 0.005
    """Temperature of the vision scores; same source."""
    num_iters: int = 3
    """Sinkhorn iterations; 3 in the released code."""
    prior_temperature: float = 0.05
    """Temperature of the word prior, mode "released" only; 0.05 in the released code."""
    prototype_source: PrototypeSource = "embed_tokens"
    """"embed_tokens" (paper: word embeddings), "lm_head" (released code; the same matrix when tied), or "frozen": the word
    embeddings as they were when the run began; or "learned": as many free vectors, which the loss trains at the adapter's rate
    (paper, Table 5b, without word embeddings)."""
    prior: bool = True
    """Weigh words by how often they occur in the texts (u_W of Eq. 9); false: all alike (Table 5b, without u_W)."""
    target_batch: int | None = None
    """Samples whose targets are found together in mode "sinkhorn". None: those of the whole step, over all processes. A number:
    of each process the first so many, the next so many, as they come out of packing; the paper's runs have 32 (per device,
    Stage I)."""
    shuffle_answers: bool = False
    """Join the answers of a sample in random order, drawn anew in every epoch, as the released code does."""
    max_text_tokens: int | None = None
    """Cut the text of a sample after this many tokens; 2048 in the released code."""

    def __post_init__(self) -> None:
        need_literals(self, "alignment.")
        need_finite(self, "alignment.")
        for name in ("target_batch", "max_text_tokens"):
            value = getattr(self, name)
            need(value is None or value > 0, f"alignment.{name} must be positive or null, got {value}")
        need(
            self.target_batch is None or self.mode == "sinkhorn",
            f'alignment.target_batch is for mode "sinkhorn", where targets depend on each other, got mode {self.mode!r}',
        )
        need(self.weight >= 0, f"alignment.weight must be at least 0, got {self.weight}")
        need(self.num_iters >= 1, f"alignment.num_iters must be at least 1, got {self.num_iters}")
        need(self.prior_temperature > 0, f"alignment.prior_temperature must be positive, got {self.prior_temperature}")
        for name in ("epsilon", "temperature"):  # alignment_loss asks for that at the first step
            value = getattr(self, name)
            need(
                value >= 2**-23,
                f"alignment.{name} must be at least 1.2e-7, what cosines in float32 are rounded to, got {value}",
            )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with one learning rate per part, linear warm-up, cosine decay to `min_lr_ratio` of the peak."""

    lr_vision: float = 0.0
    lr_adapter: float = 0.0
    lr_language: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only, never to biases, norms, position tables and learned tokens."""
    warmup_ratio: float = 0.03
    """Share of the stage's steps spent warming up."""
    warmup_from_zero: bool = False
    """Let the first step have rate 0, as Hugging Face's schedules do; false: it has the first of the rising rates."""
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; .inf: not at all."""

    def __post_init__(self) -> None:
        need_finite(self, "optim.", but=("max_grad_norm",))
        for part in PARTS:
            need(self.lr(part) >= 0, f"optim.lr_{part} must be at least 0, got {self.lr(part)}")
        need(all(0 <= beta < 1 for beta in self.betas), f"optim.betas must lie in [0, 1), got {self.betas}")
        for name in ("warmup_ratio", "min_lr_ratio"):
            need(0 <= getattr(self, name) <= 1, f"optim.{name} must lie in [0, 1], got {getattr(self, name)}")
        need(self.eps > 0, f"optim.eps must be positive, got {self.eps}")
        need(self.weight_decay >= 0, f"optim.weight_decay must be at least 0, got {self.weight_decay}")
        need(self.max_grad_norm > 0, f"optim.max_grad_norm must be positive, got {self.max_grad_norm}")

    def lr(self, part: str) -> float:
        """Peak learning rate of "vision", "adapter" or "language"."""
        return getattr(self, f"lr_{part}")


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of samples: files (`path`), a dataset of Hugging Face (`hub`), or a Python callable that returns a dataset
    (`factory`)."""

    path: str | None = None
    """LLaVA-format .json or .jsonl, or a .yaml mixture of such files; or shards that are read as a stream, .parquet or .tar
    (webdataset), with * for several."""
    hub: str | None = None
    """Name or folder of a dataset for `datasets.load_dataset`, read as a stream."""
    subset: str | None = None
    """Configuration of `hub`."""
    split: str = "train"
    """Split of `hub`."""
    shuffle: int = 256
    """Rows of a stream that are shuffled among each other, of each lane; they are held in memory."""
    weight: float | None = None
    """Share of the samples that come from this source, relative to the others of the stage; null: 1 where a source of the stage
    is a stream or has a weight, else every source by its size."""
    images: str | None = None
    """Folder that image names start from; None: that of `path`, or `hub`."""
    images_anywhere: bool = False
    """Image names may be absolute or lead out of `images`, by ".." or symbolic links; otherwise such samples are unusable."""
    factory: str | None = None
    """"package.module:callable"; called with `arguments`, returns an object with __len__ and __getitem__(i) -> Sample."""
    arguments: dict[str, Any] = field(default_factory=dict)
    sampling: str = "all"
    """"all", "first:N", "end:N" or "random:N"; N is a count or a percentage ("random:10%")."""

    def __post_init__(self) -> None:
        need(
            sum(value is not None for value in (self.path, self.hub, self.factory)) == 1,
            "a data source needs exactly one of path, hub and factory, "
            f"got path={self.path!r}, hub={self.hub!r} and factory={self.factory!r}",
        )
        for name, of in (("subset", ("hub",)), ("arguments", ("factory",)), ("images", ("path", "hub"))):
            need(
                not getattr(self, name) or any(getattr(self, kind) is not None for kind in of),
                f"data.{name} is for a {' or a '.join(of)}, got {getattr(self, name)!r}",
            )
        need(
            self.factory is None or self.factory.count(":") == 1,
            f'data.factory must look like "package.module:callable", got {self.factory!r}',
        )
        need_finite(self, "data.")
        need(self.weight is None or self.weight > 0, f"data.weight must be positive or null, got {self.weight}")
        need(self.shuffle > 0, f"data.shuffle must be positive, got {self.shuffle}")
        parse_sampling(self.sampling)


def parse_sampling(text: str) -> tuple[str, float, bool]:
    """ "random:10%" -> ("random", 10.0, True): strategy, amount, whether the amount is a percentage. "all" has amount 100 %."""
    if text == "all":
        return "all", 100.0, True
    strategy, _, amount = text.partition(":")
    percent = amount.endswith("%")
    try:
        value = float(amount.removesuffix("%")) if percent else float(int(amount))
    except ValueError:
        value = -1.0
    valid = strategy in ("first", "end", "random") and value >= 0 and not (percent and value > 100)
    need(valid, f'data.sampling must be "all", "first:N", "end:N" or "random:N" (N a count or "P%"), got {text!r}')
    return strategy, value, percent


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage of training: what trains, at which resolution, on what, for how long, with which losses."""

    name: str
    trainable: tuple[str, ...] = PARTS
    """Parts that are updated: any of "vision", "adapter", "language"."""
    rope: bool = True
    """2D rotary embedding in the vision tower on or off."""
    resolution: int | str | None = None
    """None: native size and aspect ratio. A number: square images of that side in pixels (rounded to the patch grid).
    "pretrain": square images of the side the tower was pre-trained on."""
    pad_to_square: bool = False
    """Pad images to squares, with the mean colour of the tower's statistics, before they become `resolution`; false: stretch
    them."""
    max_visual_tokens: int = MAX_VISUAL_TOKENS
    """Visual tokens of one sample as the language model sees them (after the 2x2 merge), shared by its images."""
    min_visual_tokens: int = MIN_VISUAL_TOKENS
    """Smaller images are scaled up to this many visual tokens."""
    max_text_tokens: int = 8000
    """Length of one sample in the language model, visual tokens included; longer samples are skipped and reported."""
    batch_size: int = 256
    """Samples of one optimiser step over all processes."""
    forward_visual_tokens: int | None = None
    """Packing budget: visual tokens of one forward pass of one process; None: no limit."""
    forward_text_tokens: int | None = None
    """Packing budget: text tokens of one forward pass of one process, visual ones and padding included; None: no limit. Without
    padding (language.pack_rows) that is the sum of the lengths, else rows x longest."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Stop the stage after this many steps, whatever `epochs` says."""
    optim: OptimConfig
    token_loss: Literal["token", "sample"] = "token"
    """What the next-token loss of a step is the mean of: "token", all learned tokens of the step alike, or "sample", the mean
    of each sample (paper, Eq. 6: 1/T for every text)."""
    alignment: AlignmentConfig | None = None
    """None: next-token loss only."""
    data: list[SourceConfig]

    def __post_init__(self) -> None:
        valid = self.name not in ("", ".", "..", BEFORE) and "/" not in self.name  # it names files and folders
        need(valid, f'the name of a stage must be a folder name other than "{BEFORE}", got {self.name!r}')
        need_literals(self, f"stage {self.name}: ")
        for part in self.trainable:
            need_choice(f"stage {self.name}: trainable", part, PARTS)
        need(len(self.trainable) > 0, f"stage {self.name}: trainable names no part; choose from {', '.join(PARTS)}")
        for part in self.trainable:
            rate = self.optim.lr(part)
            need(rate > 0, f"stage {self.name} trains {part}, so optim.lr_{part} must be positive, got {rate}")
        if isinstance(self.resolution, str):
            need(
                self.resolution == "pretrain",
                f'stage {self.name}: resolution must be a side in pixels, "pretrain" or null, got {self.resolution!r}',
            )
        elif self.resolution is not None:
            need(self.resolution > 0, f"stage {self.name}: resolution must be positive, got {self.resolution}")
        need(
            not self.pad_to_square or self.resolution is not None,
            f"stage {self.name}: pad_to_square needs a resolution; at native size nothing is padded",
        )
        for name in ("max_visual_tokens", "min_visual_tokens", "max_text_tokens", "batch_size"):
            need(getattr(self, name) > 0, f"stage {self.name}: {name} must be positive, got {getattr(self, name)}")
        for name in ("forward_visual_tokens", "forward_text_tokens", "max_steps"):
            value = getattr(self, name)
            need(value is None or value > 0, f"stage {self.name}: {name} must be positive or null, got {value}")
        budget, largest = self.forward_visual_tokens, self.max_visual_tokens
        need(
            budget is None or budget >= largest,
            f"stage {self.name}: forward_visual_tokens={budget} cannot hold one sample of max_visual_tokens={largest}",
        )
        budget, largest = self.forward_text_tokens, self.max_text_tokens
        need(
            budget is None or budget >= largest,
            f"stage {self.name}: forward_text_tokens={budget} cannot hold one sample of max_text_tokens={largest}",
        )
        need(
            self.min_visual_tokens <= self.max_visual_tokens,
            f"stage {self.name}: min_visual_tokens={self.min_visual_tokens} exceeds max_visual_tokens={self.max_visual_tokens}",
        )
        need_finite(self, f"stage {self.name}: ")
        need(self.epochs > 0, f"stage {self.name}: epochs must be positive, got {self.epochs}")
        need(len(self.data) > 0, f"stage {self.name}: data lists no source")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Held-out questions, answered before the first stage and after every stage."""

    data: list[SourceConfig] = field(default_factory=list)
    """No source: no evaluation."""
    metric: Literal["relaxed_accuracy", "anls", "exact_match", "vqa_accuracy", "vqav2_accuracy"] = "relaxed_accuracy"
    """Metric of samples that name none: a function of `comp.eval.metrics`."""
    max_new_tokens: int = 16
    """Longest answer."""
    batch_size: int = 16
    """Questions answered at a time per process."""
    baselines: bool = False
    """Also score answers made without looking: a random and the most frequent training answer per question type. Reads all
    answers of the last stage's data."""
    encoder: tuple[str, ...] = ()
    """Stages whose tower is measured at the end of the run, beside the one it started from (`comp.studies.encoder`)."""
    reading_steps: int = 100
    """Steps in which a new adapter and language model learn to read each of those towers, frozen; 0: not measured."""

    def __post_init__(self) -> None:
        need_literals(self, "eval.")
        need(self.reading_steps >= 0, f"eval.reading_steps must be at least 0, got {self.reading_steps}")
        for name in ("max_new_tokens", "batch_size"):
            need(getattr(self, name) > 0, f"eval.{name} must be positive, got {getattr(self, name)}")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When a run saves itself."""

    every_steps: int = 1000
    """A checkpoint after this many steps, and one at the end of every stage."""
    keep: int = 1
    """Newest checkpoints kept; older ones are deleted. The last one of each stage is exported separately."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            need(getattr(self, name) > 0, f"checkpoint.{name} must be positive, got {getattr(self, name)}")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str
    """Results go to `output_dir`/`name`."""
    output_dir: str = "runs"
    seed: int = 0
    vision: VisionConfig
    language: LanguageConfig
    stages: list[StageConfig]
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """"cuda", "cpu", or "auto": a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """"fp32", "bf16", or "auto": bf16 on a GPU, fp32 on a CPU. Parameters and optimiser state stay float32."""
    parallel: Literal["auto", "fsdp", "replicate"] = "auto"
    """Several processes: "fsdp" shards parameters, "replicate" keeps copies; "auto": fsdp on GPUs, replicate on CPUs."""
    shard_size: int | None = None
    """With "fsdp": processes that hold one copy of the parameters between them, those of a node say (a hybrid mesh: copies are
    kept equal over the groups); it must divide the number of processes. null: all of them."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them, in the vision tower and in the language model."""
    compile: bool = False
    """torch.compile the blocks of both, once for all sizes of batches."""
    balance: bool = False
    """Several processes: share out the samples of a step by the work that they will be (image sizes and lengths of text, which
    every process then looks up), not by their number."""
    peak_tflops: float | None = None
    """What one device can do in the precision of the run, in TFLOP/s, for `mfu` in metrics.jsonl; null: looked up for known
    GPUs in bfloat16, else there is no `mfu`."""
    num_workers: int = 0
    """Processes per rank that read and resize images ahead of training."""
    lanes: int = 8
    """Streams are read in so many lanes, shared out among processes and their workers, whose numbers must divide it; it must
    divide batch_size. Part of what a run learns: another number is another order of the data."""
    bad_samples: Literal["skip", "stop"] = "skip"
    """"skip": leave out samples that cannot be read, name and count them in the summary. "stop": end the run at the first."""
    max_image_pixels: int = MAX_PIXELS
    """Samples with a larger picture are unusable; found before it is decoded, which takes 8 to 17 bytes per pixel."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        need(self.name not in ("", ".", "..") and "/" not in self.name, f"name must be a folder name, got {self.name!r}")
        need(len(self.stages) > 0, "stages lists no stage")
        names = [stage.name for stage in self.stages]
        need(len(set(names)) == len(names), f"stages must have different names, got {names}")
        need_literals(self)
        for name in self.eval.encoder:
            need_choice("eval.encoder", name, tuple(names))
        need(self.output_dir != "", "output_dir must name a folder, got ''; the one you are in is .")
        need(0 <= self.seed < 2**63, f"seed must be at least 0 and below 2**63, got {self.seed}")
        need_finite(self)
        need(self.peak_tflops is None or self.peak_tflops > 0, f"peak_tflops must be positive or null, got {self.peak_tflops}")
        need(self.num_workers >= 0, f"num_workers must be at least 0, got {self.num_workers}")
        need(self.shard_size is None or self.shard_size > 0, f"shard_size must be positive or null, got {self.shard_size}")
        need(self.lanes > 0, f"lanes must be positive, got {self.lanes}")
        need(
            0 < self.max_image_pixels <= PILLOW_MAX_PIXELS,
            f"max_image_pixels must be positive and at most Pillow's own {PILLOW_MAX_PIXELS}, got {self.max_image_pixels}",
        )
