"""Builds of the CPU library in turns in one process: what a change of csrc is worth on a machine whose speed drifts.

    cp comp_kernels/lib/libcomp_kernels_cpu.so OLD.so           # then change csrc, and python setup.py build_native
    python -m benchmarks.turns OLD.so now                       # before and after the change
    python -m benchmarks.turns now:amx now:amx_bf16x3           # two instruction sets of one build
    python -m benchmarks.turns OLD.so now --dtype bfloat16 --passes forward --cases vit_s_224 many_small --rounds 25

A build is a path of libcomp_kernels_cpu.so, or `now`, the installed one; behind a colon the set it is to use, as in
COMP_KERNELS_CPU_ISA (amx_bf16x3 by name splits short sequences too). An old one must have the params structs of today's
headers. All cases of rope_attention that the benchmarks have, in one dtype. In every round each build makes two calls in a
row, the builds in random order, for in a fixed one each would find what the same other one left in the caches. Speeds are
relative to the first build, of medians and, in brackets, of shortest rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from comp_kernels import _native

from .attention_cases import CASES, inputs_of, operations
from .test_rope_attention import inference, rope_attention_of, training_step


class Build:
    """A CPU library of its own, however often its file is loaded."""

    def __init__(self, what: str, folder: Path) -> None:
        self.name = what
        name, _, instruction_set = what.partition(":")
        if instruction_set not in ("", *_native.INSTRUCTION_SETS):
            raise ValueError(f"{what}: the set must be one of {', '.join(_native.INSTRUCTION_SETS)}, got {instruction_set!r}")
        path = _native.LIB / "libcomp_kernels_cpu.so" if name == "now" else Path(name)
        if not path.is_file():
            raise ValueError(f"{what}: there is no file {path}")
        copy = folder / f"{len(list(folder.iterdir()))}.so"  # the loader gives the same library for the same file
        shutil.copy(path, copy)
        self.environment = {"COMP_KERNELS_CPU_ISA": instruction_set} if instruction_set else {}
        try:
            library = _native.with_torch_threads(ctypes.CDLL(str(copy)))
        except OSError as error:
            raise ValueError(f"{what}: {path} is no library that loads here ({error})") from None
        self.function = functools.cache(functools.partial(_native.cpu_function_of, library))
        with self.in_place():
            self.instruction_set = library.comp_kernels_cpu_isa().decode()
        if not self.instruction_set.startswith(instruction_set):
            raise ValueError(f"{what}: this processor has no {instruction_set}, {self.instruction_set} would be taken")

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The operators use it. It reads the variable when it first wants to know."""
        with mock.patch.dict(os.environ, self.environment), mock.patch.object(_native, "cpu_function", self.function):
            yield


def rounds_in_turns(builds: list[Build], call: Callable[[], object], rounds: int) -> list[list[float]]:
    """Seconds of `call`, by build and round."""

    def seconds(build: Build) -> float:
        with build.in_place():
            begin = time.perf_counter()
            call()
            call()
            return (time.perf_counter() - begin) / 2

    for build in builds:
        seconds(build)
    times: list[list[float]] = [[] for _ in builds]
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for i in random.sample(range(len(builds)), len(builds)):
            times[i].append(seconds(builds[i]))
    gc.enable()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="BUILD")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--passes", nargs="+", default=("forward", "both"), choices=("forward", "both"))
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if (reason := _native.cpu_unavailable_reason()) is not None:
        parser.error(f"{reason}; nothing but the reference would be timed")
    try:
        with tempfile.TemporaryDirectory() as folder:
            builds = [Build(what, Path(folder)) for what in arguments.builds]
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads;", ", ".join(f"{b.name}: {b.instruction_set}" for b in builds))
    for which in arguments.passes:
        for name in arguments.cases:
            case, inputs = CASES[name], inputs_of(CASES[name], getattr(torch, arguments.dtype))
            call = (inference if which == "forward" else training_step)(rope_attention_of(inputs), inputs)
            times = rounds_in_turns(builds, call, arguments.rounds)
            first, shortest = statistics.median(times[0]), min(times[0])
            done = operations(case) * (1.0 if which == "forward" else 3.5) / first / 1e9
            speeds = "  ".join(f"{first / statistics.median(t):.3f}x ({shortest / min(t):.3f}x)" for t in times[1:])
            print(f"{which:8s}{name:18s}{1e3 * first:9.2f} ms {done:6.0f} GFLOP/s  {speeds}", flush=True)


if __name__ == "__main__":
    main()
