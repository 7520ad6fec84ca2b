"""Checkpoints of a run: model, optimiser and progress, written aside and renamed, so that a crash leaves the last one whole."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..files import sync_folder, write_json
from ..parallel import World

PROGRESS = "progress.json"


class CheckpointStore:
    """The checkpoints `folder`/step-00000123, written by all processes together; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int, world: World):
        self.folder = folder
        self.keep = keep
        self.world = world

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> Path:
        """Write a checkpoint; once this returns it survives a power cut, and before that the previous one does.

        `progress` is JSON data of the caller, given back by `read_progress`. Saving changes neither model nor optimiser.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-{final.name}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.barrier()
        with _fresh_state_filled(model, optimizer), _single_process_is_meant():
            model_state, optimizer_state = get_state_dict(model, optimizer)
            dcp.save(
                {"model": model_state, "optimizer": optimizer_state},
                checkpoint_id=temporary,
                no_dist=self.world.group is None,
            )
        if self.world.is_main:
            write_json(temporary / PROGRESS, progress)
            sync_folder(temporary)
            shutil.rmtree(final, ignore_errors=True)  # same step, saved before a resume: contents are equal
            temporary.rename(final)
            sync_folder(self.folder)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        self.world.barrier()
        return final

    def complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / PROGRESS).is_file())

    def latest(self) -> Path | None:
        return next(reversed(self.complete()), None)

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill model and optimiser, which must have the shapes of those saved; the number of processes may differ."""
        model_state, optimizer_state = get_state_dict(model, optimizer)
        with _single_process_is_meant():
            dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path, no_dist=self.world.group is None)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=model_state,
            optim_state_dict=optimizer_state,
            options=StateDictOptions(strict=True),
        )


@contextmanager
def _fresh_state_filled(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within: an optimiser before its first update has the state of one that made no update; after: it has none again.

    torch's get_state_dict fills missing state by an update of zero gradients and leaves it counted: the first real update would
    then be corrected for a bias of two.
    """
    fresh = not optimizer.state
    if fresh:
        get_state_dict(model, optimizer)
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0
    try:
        yield
    finally:
        if fresh:
            optimizer.state.clear()


def read_progress(path: Path) -> dict[str, Any]:
    return json.loads((path / PROGRESS).read_text())


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    """Hides torch's remark that it saves or loads without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
