"""Running compiled GPU code without a GPU: imports ptx_emulator, and keeps a process in which Triton compiles.

Triton decides when it is imported whether kernels are interpreted or compiled, once for the whole process. The suite itself
runs with the interpreter (see conftest.py); what must be compiled goes through `run_compiled`.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import pytest

EMULATOR = Path(__file__).resolve().parents[1] / "ptx_emulator"


def emulator_missing() -> str | None:
    """Why compiled kernels cannot be executed here, for a skip; None when they can."""
    return "ptx_emulator needs g++" if shutil.which(os.environ.get("CXX", "g++")) is None else None


needs_emulator = pytest.mark.skipif(emulator_missing() is not None, reason=emulator_missing() or "")


def import_emulator():
    """The ptx_emulator module."""
    if str(EMULATOR) not in sys.path:
        sys.path.insert(0, str(EMULATOR))
    import ptx_emulator

    return ptx_emulator


def _prepare_process() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    torch.set_num_threads(1)


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_process)


def run_compiled(function: Callable, *args, **kwargs):
    """function(*args, **kwargs) in a process where Triton compiles; `function` is defined at the top of a test module.

    Results and failed assertions come back as if it had run here. The process is kept for the next call.
    """
    return _process().submit(function, *args, **kwargs).result()


def emulating_launcher(reports: list | None = None, target: int = 80, **launch_options) -> Callable:
    """A launcher for `comp_kernels._triton.launches_go_to` that runs each kernel's PTX for sm_{target} on the emulator.

    reports: receives (kernel name, report) of every launch. launch_options: seed, quantum, checks (see ptx_emulator).
    """
    from comp_kernels._triton import OPTIONS  # not above: _prepare_process comes before what may import Triton

    emulator = import_emulator()

    def launcher(kernel, grid, *args, num_warps, num_stages, **constexprs):
        report = emulator.triton_launch(
            kernel, grid, *args, target=target, num_warps=num_warps, num_stages=num_stages,
            options=OPTIONS, launch=launch_options, **constexprs,
        )  # fmt: skip
        if reports is not None:
            reports.append((kernel.__name__, report))

    return launcher
