"""Checkpoints of a run: model, optimiser and progress, written aside and renamed, so that a crash leaves the last one whole."""

from __future__ import annotations

import copy
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..config import ConfigError
from ..files import sync_folder, write_json
from ..parallel import World

PROGRESS, SIZES = "progress.json", "sizes.json"
UNFINISHED = ".writing-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names the disk and the last good checkpoint."""


class CheckpointStore:
    """The checkpoints `folder`/step-00000123, written by all processes together; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int, world: World):
        self.folder = folder
        self.keep = keep
        self.world = world

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> Path:
        """Write a checkpoint; once this returns it survives a power cut, and before that the previous one does.

        `progress` is JSON data of the caller, given back by `read_progress`. Saving changes neither model nor optimiser.
        What kills have left unfinished is removed first, and so are checkpoints of later steps: the run went back behind them.
        Raises CheckpointError on every process where one cannot write.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"{UNFINISHED}{final.name}"
        with self._disk_problems_named(temporary):
            if self.world.is_main:
                for stale in (*self.folder.glob(f"{UNFINISHED}*"), *self._later(final)):
                    shutil.rmtree(stale)
                temporary.mkdir(parents=True)
        with self._disk_problems_named(temporary), _state_filled(model, optimizer), _single_process_is_meant():
            model_state, optimizer_state = get_state_dict(model, optimizer)
            dcp.save(
                {"model": model_state, "optimizer": optimizer_state},
                checkpoint_id=temporary,
                no_dist=self.world.group is None,
            )
        with self._disk_problems_named(temporary):
            if self.world.is_main:
                write_json(temporary / PROGRESS, progress)
                write_json(temporary / SIZES, _sizes(temporary))  # last: what has it is complete
                sync_folder(temporary)
                shutil.rmtree(final, ignore_errors=True)  # same step, saved before a resume: contents are equal
                temporary.rename(final)
                sync_folder(self.folder)
                for old in self.complete()[: -self.keep]:
                    shutil.rmtree(old)
        return final

    def complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / PROGRESS).is_file())

    def latest(self) -> Path | None:
        return next(reversed(self.complete()), None)

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that nothing has damaged since, and what is wrong with each newer one."""
        problems = []
        for path in reversed(self.complete()):
            problem = damage(path)
            if problem is None:
                return path, problems
            problems.append(f"checkpoint {path} is damaged: {problem}")
        return None, problems

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill model and optimiser, which must have the shapes of those saved; the number of processes may differ.

        Raises ConfigError that names the checkpoint where it cannot be read.
        """
        _fill_state(model, optimizer)  # what the file has must find its place
        model_state, optimizer_state = get_state_dict(model, optimizer)
        try:
            with _single_process_is_meant():
                state = {"model": model_state, "optimizer": optimizer_state}
                dcp.load(state, checkpoint_id=path, no_dist=self.world.group is None)
        except (Exception, CheckpointException) as error:  # the second is no Exception
            raise ConfigError(f"checkpoint {path} cannot be loaded: {_cause(error)}") from error
        set_state_dict(
            model,
            optimizer,
            model_state_dict=model_state,
            optim_state_dict=optimizer_state,
            options=StateDictOptions(strict=True),
        )

    def _later(self, final: Path) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if path.name > final.name]

    @contextmanager
    def _disk_problems_named(self, temporary: Path) -> Iterator[None]:
        """Within: part of a checkpoint is written. Where a process cannot, all of them raise CheckpointError, and what was
        written of this checkpoint is removed. All processes leave together."""
        problem: BaseException | None = None
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = error
        causes = [cause for cause in self.world.gather(_cause(problem) if problem else None) if cause]
        if not causes:
            return
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {temporary.name.removeprefix(UNFINISHED)} cannot be written to {self.folder}: {causes[0]} "
            f"({_free_space(self.folder)}). The last good checkpoint is {self.newest_whole()[0] or 'none'}"
        ) from problem


def _cause(error: BaseException) -> str:
    """One line for what torch wraps in many; the failures of all processes are in a CheckpointException."""
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _free_space(folder: Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return str(error)
    return f"{usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free"


def damage(path: Path) -> str | None:
    """What is wrong with a finished checkpoint, None where nothing is: every file has the size it was written with.

    Content of the right size is not read; a checkpoint from before sizes were noted is judged by its progress alone.
    """
    try:
        progress = json.loads((path / PROGRESS).read_text())
        sizes = json.loads((path / SIZES).read_text()) if (path / SIZES).is_file() else {}
        found = _sizes(path)
    except (OSError, ValueError) as error:
        return f"{PROGRESS} or {SIZES} cannot be read ({error})"
    if not isinstance(progress, dict) or not isinstance(sizes, dict):
        return f"{PROGRESS} or {SIZES} holds no JSON object"
    for name, size in sizes.items():
        if found.get(name) != size:
            return f"{name} is missing" if name not in found else f"{name} has {found[name]} of {size} bytes"
    return None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != SIZES}


@contextmanager
def _state_filled(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within: parameters that the optimiser has not updated yet have the state of no update; after: they have none again."""
    filled = _fill_state(model, optimizer)
    try:
        yield
    finally:
        for parameter in filled:
            del optimizer.state[parameter]


def _fill_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Give parameters that the optimiser has not updated yet the state of no update; returns them.

    torch's get_state_dict fills the state of an optimiser that has none by an update of zero gradients and leaves it counted:
    the first real update would then be corrected for a bias of two. State that is missing for some parameters only (without
    gradients so far) it leaves out, and does not find when it loads.
    """
    missing = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    if not optimizer.state:
        get_state_dict(model, optimizer)
    for parameter in missing:
        if parameter not in optimizer.state and optimizer.state:
            pattern_of, pattern = next(iter(optimizer.state.items()))
            optimizer.state[parameter] = {
                name: torch.zeros_like(parameter) if _is_like(value, pattern_of) else copy.deepcopy(value)
                for name, value in pattern.items()
            }
        _reset(optimizer.state[parameter])
    return missing


def _is_like(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _reset(state: dict[str, Any]) -> None:
    if "step" in state:
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def read_progress(path: Path) -> dict[str, Any]:
    return json.loads((path / PROGRESS).read_text())


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    """Hides torch's remark that it saves or loads without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
