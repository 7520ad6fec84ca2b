"""Recipes with data and weights that install from package registries: `tiny`, the default, and `smollm2`.

Every number is ours, tuned for parts of a million weights; what the paper fixes (the order of the stages, what trains in each,
rotary embedding from Stage II on, the alignment loss in Stages I and II alone) is kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..config import (
    AlignmentConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    LanguageConfig,
    OptimConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
)

ASSETS = Path(__file__).parent / "assets"
FIRST: dict[str, Any] = dict(name="I", trainable=("adapter",), rope=False, resolution="pretrain")
"""Stage I: the adapter alone, at the resolution that the tower knows."""


def tiny() -> Config:
    """Handwriting and charts, from a tower that has seen 64 x 64 pixels and a language model that has seen no image."""
    # several passes per step: a third of the memory
    stage = partial(StageConfig, max_visual_tokens=128, max_text_tokens=320, batch_size=32, forward_text_tokens=2400)
    alignment = AlignmentConfig(weight=0.2, mode="sinkhorn", epsilon=0.05, temperature=0.05)
    everything = OptimConfig(lr_vision=2e-4, lr_adapter=2e-3, lr_language=5e-4, betas=(0.9, 0.98))
    second = partial(stage, optim=everything, alignment=alignment)
    return Config(
        name="tiny",
        vision=VisionConfig(path=str(ASSETS / "vision")),
        language=LanguageConfig(path=str(ASSETS / "language")),
        stages=[
            stage(
                **FIRST,
                max_steps=200,
                optim=OptimConfig(lr_adapter=4e-3, betas=(0.9, 0.98)),
                alignment=alignment,
                data=[short_strips(seed=1)],
            ),
            second(name="II-a", resolution=96, max_steps=80, data=[short_strips(seed=2), pages(seed=2)]),
            second(name="II-b", max_steps=360, data=[short_strips(seed=3), pages(seed=3)]),
            stage(
                name="III",
                max_steps=160,
                optim=OptimConfig(lr_vision=5e-5, lr_adapter=5e-4, lr_language=5e-4, betas=(0.9, 0.98)),
                data=[pages(seed=4, transcript=False)],
            ),
        ],
        eval=EvalConfig(
            data=[SourceConfig(factory="comp.tiny.pages:TinyPages", arguments=dict(split="heldout", size=240))],
            max_new_tokens=8,
            batch_size=80,
            baselines=True,
            encoder=("II-b", "III"),
            reading_steps=60,
        ),
    )


def short_strips(seed: int) -> SourceConfig:
    """Strips of two or three digits; each stage draws its own."""
    return SourceConfig(factory="comp.tiny.pages:ShortStrips", arguments=dict(size=8000, seed=seed, transcript=True))


def pages(seed: int, transcript: bool = True) -> SourceConfig:
    """All sorts of pages with several questions each; each stage draws its own."""
    return SourceConfig(
        factory="comp.tiny.pages:TinyPages", arguments=dict(split="train", size=8000, seed=seed, transcript=transcript)
    )


def smollm2(data: str = "data/smollm2") -> Config:
    """SmolLM2-135M-Instruct and the tower of `tiny` on captions, charts and typeset lines, at native resolution.

    First `python -m comp.fetch data/smollm2` (docs/tiny.md). For a tower that has seen the world, set vision.path to a
    folder with SigLIP, DINOv2 or AIMv2 weights. Learning rates are the paper's (arXiv 2503.18931v2, Table 11) but for the tower
    and the adapter of stages with a small tower, which start from less.
    """
    stage = partial(
        StageConfig,
        max_visual_tokens=256,
        max_text_tokens=512,
        batch_size=32,
        forward_visual_tokens=2048,
        forward_text_tokens=4096,
        data=[SourceConfig(path=f"{data}/train.yaml")],
    )
    alignment = AlignmentConfig()
    everything = OptimConfig(lr_vision=3e-4, lr_adapter=1e-3, lr_language=2e-5)
    return Config(
        name="smollm2",
        vision=VisionConfig(path=str(ASSETS / "vision")),
        language=LanguageConfig(path=f"{data}/language"),
        stages=[
            stage(
                **FIRST,
                optim=OptimConfig(lr_adapter=1e-3),
                alignment=alignment,
            ),
            stage(name="II-a", resolution=192, optim=everything, alignment=alignment),
            stage(name="II-b", optim=everything, alignment=alignment),
            stage(name="III", optim=OptimConfig(lr_vision=2e-5, lr_adapter=1e-5, lr_language=1e-5)),
        ],
        eval=EvalConfig(
            data=[SourceConfig(path=f"{data}/heldout.yaml")],
            metric="anls",
            max_new_tokens=32,
            batch_size=16,
        ),
        checkpoint=CheckpointConfig(every_steps=100),
    )
