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
from ..files import checksum, sync_folder, write_json
from ..parallel import World

PROGRESS, FILES = "progress.json", "files.json"
SIZES = "sizes.json"  # what older versions wrote in place of FILES: sizes alone
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
            own = {path.name: _described(path) for path in _files(temporary) if self._wrote(path)}
        described = {name: file for share in self.world.gather(own) for name, file in share.items()}
        with self._disk_problems_named(temporary):
            if self.world.is_main:
                write_json(temporary / FILES, described)  # last: what has it is complete
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

    def newest_whole(self) -> Path | None:
        """The newest checkpoint of which no file is missing or cut off: a quick look, which any process may take alone."""
        return next((path for path in reversed(self.complete()) if damage(path) is None), None)

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files hold what was written, and what is wrong with each newer one.

        Reads them whole, each process a share; all processes call it.
        """
        problems: list[str] = []
        for path in reversed(self.complete()):
            found = self.world.gather(damage(path) or changed(path, self.world.rank, self.world.size))
            problem = next(filter(None, found), None)
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

    def _wrote(self, path: Path) -> bool:
        """Whether this process wrote a file of a checkpoint: torch names those of rank r __r_0.distcp and so on."""
        rank = path.name.split("_")[2] if path.name.startswith("__") else "0"
        return (int(rank) if rank.isdigit() else 0) == self.world.rank

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
            f"({_free_space(self.folder)}). The last good checkpoint is {self.newest_whole() or 'none'}"
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
    """What is wrong with a finished checkpoint by its smallest files and the sizes of all, None where nothing is.

    A checkpoint from before sizes were noted is judged by its progress alone.
    """
    try:
        progress, noted = json.loads((path / PROGRESS).read_text()), _noted(path)
        found = {file.name: file.stat().st_size for file in _files(path)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{PROGRESS} or {FILES} cannot be read ({type(error).__name__}: {error})"
    if not isinstance(progress, dict):
        return f"{PROGRESS} holds no JSON object"
    for name, file in noted.items():
        if found.get(name) != file["bytes"]:
            return f"{name} is missing" if name not in found else f"{name} has {found[name]} of {file['bytes']} bytes"
    return None


def changed(path: Path, rank: int = 0, size: int = 1) -> str | None:
    """A file whose content is not what was written, among each `size`th from number `rank` on; None where there is none.

    Checkpoints that older versions wrote have no checksums.
    """
    try:
        for name, file in sorted(_noted(path).items())[rank::size]:
            if "crc32" in file and checksum(path / name) != file["crc32"]:
                return f"the content of {name} has changed since it was written"
    except OSError as error:
        return str(error)
    return None


def _noted(path: Path) -> dict[str, dict[str, int]]:
    """What a checkpoint's own list says of its files: "bytes" and, but in those of older versions, "crc32"."""
    if (path / FILES).is_file():
        files = json.loads((path / FILES).read_text())
        return {name: {"bytes": int(file["bytes"]), "crc32": int(file["crc32"])} for name, file in files.items()}
    sizes = json.loads((path / SIZES).read_text()) if (path / SIZES).is_file() else {}
    return {name: {"bytes": int(size)} for name, size in sizes.items()}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name not in (FILES, SIZES)]


def _described(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


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
    the first real update would then be corrected for a bias of two (findings/torch_dcp_get_state_dict_counts_a_step.sh).
    State that is missing for some parameters only (without gradients so far) it leaves out, and does not find when it loads.
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


def _is_like(value: Any, parameter: torch.Tensor) -> bool:
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
