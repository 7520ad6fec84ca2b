"""The configuration of a run: plain dataclasses that validate themselves.

A recipe (`comp.recipes`) is a function that returns a whole `Config`; a stage is data. `comp.config_io` reads, writes and
changes configurations by field names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from comp_kernels.ops.alignment_loss.reference import MODES

from .data.decode import MAX_PIXELS, PILLOW_MAX_PIXELS
from .eval.metrics import METRICS
from .model.adapter import INITS
from .model.comp import POSITION_IDS, PROTOTYPE_SOURCES
from .model.vit_config import ABS_POS_INTERPS, ABS_POS_ORDERS, POS_MODES

PARTS = ("vision", "adapter", "language")
BEFORE = "before"
"""What results before the first stage are called; no stage may be."""
ALIGNMENT_MODES = (*MODES, "contrastive")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, what it holds and what it needs."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def need_choice(name: str, value: object, choices: Sequence[object]) -> None:
    need(value in choices, f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """The pre-trained vision tower."""

    path: str
    """Directory with config.json and model.safetensors in Hugging Face layout, or a hub id."""
    pos_mode: str = "abs+rope"
    """Position signal while a stage has `rope` on: "abs+rope" (CoMP) or "rope". Stages with `rope` off use "abs"."""
    abs_pos_order: str | None = None
    """Order of the position table: "merge", "raster_legacy", or None for the one the checkpoint needs."""
    abs_pos_interp: str | None = None
    """Resampling of the position table: "bicubic" (released code), "bilinear" (paper), or None for the tower's own."""
    pretrain_resolution: int | None = None
    """Side in pixels of the images the tower was pre-trained on; None: what its position table covers."""
    adapter_init: str = "lecun"
    """Weights of a new adapter: "lecun" or "truncated" (`comp.model.Adapter`)."""

    def __post_init__(self) -> None:
        need_choice("vision.pos_mode", self.pos_mode, POS_MODES)
        need_choice("vision.abs_pos_order", self.abs_pos_order, (None, *ABS_POS_ORDERS))
        need_choice("vision.adapter_init", self.adapter_init, INITS)
        need_choice("vision.abs_pos_interp", self.abs_pos_interp, (None, *ABS_POS_INTERPS))


@dataclass(kw_only=True, slots=True)
class LanguageConfig:
    """The pre-trained language model."""

    path: str
    """Directory of a transformers causal language model with its tokenizer, or a hub id."""
    tokenizer: str | None = None
    """Directory of the tokenizer where it is not beside the model."""
    position_ids: str = "mrope"
    """"mrope": image tokens carry (time, row, column), as Qwen2-VL; "1d": plain running index."""

    def __post_init__(self) -> None:
        need_choice("language.position_ids", self.position_ids, POSITION_IDS)


@dataclass(kw_only=True, slots=True)
class AlignmentConfig:
    """The alignment loss of a stage (`comp_kernels.alignment_loss`)."""

    weight: float = 0.05
    """alpha of arXiv 2503.18931v2, Eq. 11."""
    mode: str = "sinkhorn"
    """How the target distribution is made; formulas in `comp_kernels.alignment_loss`. "contrastive" has no distribution over
    words: images pick their texts (`comp.losses.contrastive_loss`), and of the fields below `temperature` alone counts."""
    epsilon: float = 0.005
    """Temperature of the text scores; v2 appendix C: "all temperature coefficients are 0.005"."""
    temperature: float = 0.005
    """Temperature of the vision scores; same source."""
    num_iters: int = 3
    """Sinkhorn iterations; 3 in the released code."""
    prior_temperature: float = 0.05
    """Temperature of the word prior, mode "released" only; 0.05 in the released code."""
    prototype_source: str = "embed_tokens"
    """"embed_tokens" (paper: word embeddings), "lm_head" (released code; the same matrix when tied), or "frozen": the word
    embeddings as they were when the run began."""

    def __post_init__(self) -> None:
        need_choice("alignment.mode", self.mode, ALIGNMENT_MODES)
        need_choice("alignment.prototype_source", self.prototype_source, PROTOTYPE_SOURCES)
        need(self.weight >= 0, f"alignment.weight must be at least 0, got {self.weight}")
        need(self.num_iters >= 1, f"alignment.num_iters must be at least 1, got {self.num_iters}")
        for name in ("epsilon", "temperature", "prior_temperature"):
            need(getattr(self, name) > 0, f"alignment.{name} must be positive, got {getattr(self, name)}")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with one learning rate per part, linear warm-up, cosine decay to `min_lr_ratio` of the peak."""

    lr_vision: float = 0.0
    lr_adapter: float = 0.0
    lr_language: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only, never to biases, norms and position tables."""
    warmup_ratio: float = 0.03
    """Share of the stage's steps spent warming up."""
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
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
    """One source of samples: either a file (`path`) or a Python callable that returns a dataset (`factory`)."""

    path: str | None = None
    """LLaVA-format .json or .jsonl, or a .yaml mixture of such files."""
    images: str | None = None
    """Folder that image names start from; None: the folder of `path`."""
    images_anywhere: bool = False
    """Image names may be absolute or lead out of `images`, by ".." or symbolic links; otherwise such samples are unusable."""
    factory: str | None = None
    """"package.module:callable"; called with `arguments`, returns an object with __len__ and __getitem__(i) -> Sample."""
    arguments: dict[str, Any] = field(default_factory=dict)
    sampling: str = "all"
    """"all", "first:N", "end:N" or "random:N"; N is a count or a percentage ("random:10%")."""

    def __post_init__(self) -> None:
        need(
            (self.path is None) != (self.factory is None),
            f"a data source needs exactly one of path and factory, got path={self.path!r} and factory={self.factory!r}",
        )
        need(
            self.factory is None or self.factory.count(":") == 1,
            f'data.factory must look like "package.module:callable", got {self.factory!r}',
        )
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
    max_visual_tokens: int = 3000
    """Visual tokens of one sample as the language model sees them (after the 2x2 merge), shared by its images."""
    min_visual_tokens: int = 4
    """Smaller images are scaled up to this many visual tokens."""
    max_text_tokens: int = 8000
    """Length of one sample in the language model, visual tokens included; longer samples are skipped and reported."""
    batch_size: int = 256
    """Samples of one optimiser step over all processes."""
    forward_visual_tokens: int | None = None
    """Packing budget: visual tokens of one forward pass of one process; None: no limit."""
    forward_text_tokens: int | None = None
    """Packing budget: rows x padded length of one forward pass of one process; None: no limit."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Stop the stage after this many steps, whatever `epochs` says."""
    optim: OptimConfig
    alignment: AlignmentConfig | None = None
    """None: next-token loss only."""
    data: list[SourceConfig]

    def __post_init__(self) -> None:
        valid = self.name not in ("", ".", "..", BEFORE) and "/" not in self.name  # it names files and folders
        need(valid, f'the name of a stage must be a folder name other than "{BEFORE}", got {self.name!r}')
        for part in self.trainable:
            need_choice(f"trainable of stage {self.name}", part, PARTS)
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
        need(self.epochs > 0, f"stage {self.name}: epochs must be positive, got {self.epochs}")
        need(len(self.data) > 0, f"stage {self.name}: data lists no source")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Held-out questions, answered before the first stage and after every stage."""

    data: list[SourceConfig] = field(default_factory=list)
    """No source: no evaluation."""
    metric: str = "relaxed_accuracy"
    """Metric of samples that name none: a function of `comp.eval.metrics`."""
    max_new_tokens: int = 16
    """Longest answer."""
    batch_size: int = 16
    """Questions answered at a time per process."""
    baselines: bool = False
    """Also score answers made without looking: a random and the most frequent training answer per question type. Reads all
    answers of the last stage's data."""

    def __post_init__(self) -> None:
        need_choice("eval.metric", self.metric, tuple(METRICS))
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
    device: str = "auto"
    """"cuda", "cpu", or "auto": a GPU when there is one."""
    precision: str = "auto"
    """"fp32", "bf16", or "auto": bf16 on a GPU, fp32 on a CPU. Parameters and optimiser state stay float32."""
    parallel: str = "auto"
    """Several processes: "fsdp" shards parameters, "replicate" keeps copies; "auto": fsdp on GPUs, replicate on CPUs."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    num_workers: int = 0
    """Processes per rank that read and resize images ahead of training."""
    bad_samples: str = "skip"
    """"skip": leave out samples that cannot be read, name and count them in the summary. "stop": end the run at the first."""
    max_image_pixels: int = MAX_PIXELS
    """Samples with a larger picture are unusable; found before it is decoded, which takes 8 to 17 bytes per pixel."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        need(self.name not in ("", ".", "..") and "/" not in self.name, f"name must be a folder name, got {self.name!r}")
        need(len(self.stages) > 0, "stages lists no stage")
        names = [stage.name for stage in self.stages]
        need(len(set(names)) == len(names), f"stages must have different names, got {names}")
        need_choice("device", self.device, ("auto", "cuda", "cpu"))
        need_choice("precision", self.precision, ("auto", "fp32", "bf16"))
        need_choice("parallel", self.parallel, ("auto", "fsdp", "replicate"))
        need_choice("bad_samples", self.bad_samples, ("skip", "stop"))
        need(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
        need(self.num_workers >= 0, f"num_workers must be at least 0, got {self.num_workers}")
        need(
            0 < self.max_image_pixels <= PILLOW_MAX_PIXELS,
            f"max_image_pixels must be positive and at most Pillow's own {PILLOW_MAX_PIXELS}, got {self.max_image_pixels}",
        )
