"""The folder of a run: whose it is, how far the run has come, and where to continue."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..config import Config, ConfigError
from ..config_io import differences, read_config, to_dict
from ..files import checksum, write_json
from ..parallel import World
from .checkpoint import CheckpointStore, read_progress

LOCK = ".lock"

# What does not change what is learned, up to rounding; "checkpoint" stands for all its fields.
MAY_DIFFER_ON_RESUME = (
    "output_dir",
    "num_workers",
    "tensorboard",
    "checkpoint",
    "device",
    "parallel",
    "activation_checkpointing",
    "shard_size",
    "compile",
    "balance",
    "peak_tflops",
    "language.attention",
    "language.pack_rows",
    "language.liger",
    "bad_samples",
    "eval.batch_size",
    "eval.encoder",
    "eval.reading_steps",
    "stages.*.forward_visual_tokens",
    "stages.*.forward_text_tokens",
)


@dataclass(kw_only=True, slots=True)
class RunState:
    """How far a run has come; stored with every checkpoint."""

    stage: int = 0
    step_in_stage: int = 0
    samples_in_stage: int = 0
    step: int = 0  # optimiser steps of all stages so far
    seconds: float = 0.0  # time spent so far, evaluation included
    samples: int = 0
    images: int = 0
    text_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # message of an unusable sample -> times met
    skipped_samples: dict[str, int] = field(default_factory=dict)  # place of an unusable sample -> times met
    notes: list[str] = field(default_factory=list)  # what the records hold and nobody reads
    sizes: dict[str, list[int]] = field(default_factory=dict)  # of the sources of each stage, as `Mixture.sizes` has them
    lanes: dict[str, Any] = field(default_factory=dict)  # where each lane of the stage stands, where it is streamed
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    metrics_bytes: int = 0  # length of metrics.jsonl that belongs to this state
    checksums: dict[str, int] = field(default_factory=dict)  # of that and of other files beside the checkpoints that it needs


def find_state(folder: Path, config: Config, store: CheckpointStore, *, resume: bool) -> tuple[RunState, Path | None]:
    """Where a run in `folder` begins: at its newest intact checkpoint when resuming, else at the start. Damaged ones are named.

    ConfigError: the folder holds results and `resume` is false, the run in it was started with another configuration, its
    records are gone or changed while its checkpoints are there, or all its checkpoints are damaged.
    """
    metrics, stored = folder / "metrics.jsonl", folder / "config.json"
    holds_results = stored.is_file() and metrics.is_file() and metrics.stat().st_size > 0
    if not holds_results:
        if store.latest() is not None:
            lacks = " and ".join(path.name for path in (stored, metrics) if not path.is_file() or path.stat().st_size == 0)
            raise ConfigError(
                f"{store.folder} holds checkpoints, but {folder} lacks {lacks}; restore it, or choose another name=NAME"
            )
        return RunState(), None
    if not resume:
        raise ConfigError(f"{folder} holds a run already; continue it with --resume, or choose another name=NAME")
    changed = differences(to_dict(read_config(stored)), to_dict(config))
    changed = [name for name in changed if not {name.split(".")[0], re.sub(r"\.\d+\.", ".*.", name)} & {*MAY_DIFFER_ON_RESUME}]
    if changed:
        raise ConfigError(f"--resume needs the configuration the run was started with; these differ: {', '.join(changed)}")
    checkpoint, damaged = store.newest_intact()
    if damaged and checkpoint is None:
        raise ConfigError(f"--resume finds no whole checkpoint: {'; '.join(damaged)}")
    if damaged and store.world.is_main:
        print("\n".join([*damaged, f"continuing from {checkpoint}"]), file=sys.stderr)
    if checkpoint is None:
        return RunState(), None
    try:
        state = RunState(**read_progress(checkpoint))
    except TypeError as error:
        raise ConfigError(f"checkpoint {checkpoint} is of another version: {error}") from error
    if metrics.stat().st_size < state.metrics_bytes or not is_unchanged(metrics, state, state.metrics_bytes):
        raise ConfigError(
            f"{metrics} is not what it was when {checkpoint} was written ({metrics.stat().st_size} bytes, it had "
            f"{state.metrics_bytes}); restore it, or choose another name=NAME"
        )
    return state, checkpoint


def is_unchanged(path: Path, state: RunState, num_bytes: int | None = None) -> bool:
    """Whether a file, or its first `num_bytes`, is what it was when the state was saved; older versions did not note it."""
    return state.checksums.get(path.name) in (None, checksum(path, num_bytes))


def claim_folder(folder: Path, config: Config, world: World) -> IO[str] | None:
    """Note the configuration in the folder of the run; after all processes have looked at it with `find_state`.

    The folder is this run's as long as the file that the first process gets stays open, which no kill outlasts.
    ConfigError on every process: the folder cannot be written, or another run writes to it.
    """
    claim, problem = None, None
    world.barrier()
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            claim = (folder / LOCK).open("a+")
            problem = _lock(claim, folder)
            if problem is None:
                write_json(folder / "config.json", to_dict(config))
        except OSError as error:
            problem = f"output_dir {config.output_dir} cannot be written: {error}"
    problem = world.gather(problem)[0]
    if problem is not None:
        raise ConfigError(problem)
    return claim


def _lock(claim: IO[str], folder: Path) -> str | None:
    """Why the file cannot be locked: another process holds it, who is named. File systems without locks lock nothing."""
    try:
        fcntl.lockf(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers that outlive this process would hold it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        claim.seek(0)
        return (
            f"another run writes to {folder} ({claim.read().strip() or 'it does not say which'}); wait for its end or stop it, "
            "or choose another name=NAME"
        )
    claim.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=claim, flush=True)
    return None
