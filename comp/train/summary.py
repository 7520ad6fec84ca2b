"""The end of a run in figures: summary.json and the printed table of held-out scores."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from ..config import Config, StageConfig
from ..eval.vqa import all_types, percent
from ..log import read_records, table
from ..model.multimodal import CoMP
from ..parallel import World
from .optim import learning
from .run_state import RunState

MAX_SKIPPED_NAMES = 1000


def summarize(
    config: Config, state: RunState, baselines: dict[str, Any], metrics: Path, world: World, model: CoMP
) -> dict[str, Any]:
    """Everything a reader of results asks for: scores, losses and speed per stage, what trained, what was skipped, where."""
    train = read_records(metrics, "train")
    return {
        "name": config.name,
        "evaluations": state.evaluations,
        "baselines": baselines,
        "stages": [_stage_summary(stage, [r for r in train if r["stage"] == stage.name], model) for stage in config.stages],
        "steps": state.step,
        "samples": state.samples,
        "images": state.images,
        "text_tokens": state.text_tokens,
        "seconds": state.seconds,
        "skipped": {
            "samples": len(state.skipped_samples),  # one may have several messages: stages have limits of their own
            "times": sum(state.skipped_samples.values()),
            "messages": dict(list(state.skipped.items())[:MAX_SKIPPED_NAMES]),
        },
        "notes": state.notes,
        "machine": {
            "processes": world.size,
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _stage_summary(stage: StageConfig, records: Sequence[dict[str, Any]], model: CoMP) -> dict[str, Any]:
    """Losses are means over the first and the last tenth of the stage's steps."""
    tenth = max(1, len(records) // 10)
    summary: dict[str, Any] = {
        "name": stage.name,
        "steps": len(records),
        "parameters": {
            part: {
                "all": sum(p.numel() for p in named.values()),
                "trainable": sum(p.numel() for p in learning(named)) if part in stage.trainable else 0,
                "lr": stage.optim.lr(part) if part in stage.trainable else 0.0,
            }
            for part, named in model.named_parts().items()
        },
    }
    for name in ("token_loss", "alignment_loss"):
        values = [r[name] for r in records if name in r]
        if values:
            summary[name] = {"first": mean(values[:tenth]), "last": mean(values[-tenth:])}
    for name in ("images_per_s", "tokens_per_s", "step_time", "padding", "mfu"):
        if records and name in records[-1]:
            summary[f"median_{name}"] = median(r[name] for r in records)
    summary["seconds_in_steps"] = sum(r["step_time"] for r in records)
    return summary


def result_table(evaluations: Sequence[dict[str, Any]], baselines: dict[str, Any] | None = None) -> str:
    """Held-out scores in per cent: a row per question type, a column per baseline and per evaluation."""
    columns = {**(baselines or {}), **{e["label"]: e["scores"] for e in evaluations}}
    rows = [
        [name, str(entry["count"]), *(percent(scores, name) for scores in columns.values())]
        for name, entry in all_types(e["scores"] for e in evaluations).items()
    ]
    return table(["question type", "count", *columns], rows)
