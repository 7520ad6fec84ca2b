"""What a finished run was and became: its configuration, and the models of its stages, by the folder of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from .build import load_tower
from .config import BEFORE, Config, ConfigError, VisionConfig
from .config_io import read_config
from .model import VisionEncoder


def run_config(run: Path) -> Config:
    """The configuration that the run in folder `run` was started with."""
    if not (run / "config.json").is_file():
        raise ConfigError(f"RUN must be the folder of a run with its config.json, got {run}")
    return read_config(run / "config.json")


def trained_config(run: Path, stage: str | None = None) -> Config:
    """`run_config` with its models replaced by those that `stage` (default: the last) produced, and no other stage."""
    config = run_config(run)
    names = [s.name for s in config.stages]
    stage = names[-1] if stage is None else stage
    if stage not in names:
        raise ConfigError(f"stage must be one of {', '.join(names)}, got {stage!r}")
    models = run / "models" / stage
    if not models.is_dir():
        raise ConfigError(f"{models} does not exist: stage {stage} of this run is not finished")
    return dataclasses.replace(
        config,
        vision=VisionConfig(  # the export knows what else was chosen for it
            path=str(models / "vision"),
            pos_mode=config.vision.pos_mode,
            pretrain_resolution=config.vision.pretrain_resolution,
        ),
        language=dataclasses.replace(config.language, path=str(models / "language"), tokenizer=None, lora=None),  # merged
        stages=[s for s in config.stages if s.name == stage],
        eval=dataclasses.replace(config.eval, encoder=()),  # names stages that are gone
    )


def encoders_of(run: Path, stages: Sequence[str] | None = None) -> Iterator[tuple[str, VisionEncoder]]:
    """The encoder that the run in folder `run` started from, then those that `stages` (default: the last) made; float32."""
    trained = [trained_config(run, stage) for stage in stages] if stages else [trained_config(run)]
    yield BEFORE, load_tower(run_config(run).vision).eval()
    for config in trained:
        yield config.stages[0].name, VisionEncoder.from_pretrained(config.vision.path).float().eval()
