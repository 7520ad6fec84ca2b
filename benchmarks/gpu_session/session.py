"""What every part is given: where its results go, on what it runs, how it takes the time."""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import comp_kernels as ck
from comp_kernels import _native

from .workloads import TINY_WORKLOADS, WORKLOADS

ROOT = Path(__file__).parents[2]

# What turns on kernels of rope_attention, comp_kernels_cuda_rope_attention_set_*; -1: the number of multiprocessors.
SWITCHES = {
    "ours": {},
    "ours, short": {"short": 256},
    "ours, persistent": {"persistent": -1},
    "ours, dependent launch": {"dependent": 1},
    "ours, values in place": {"values_in_place": 1},
    "ours, values in place, dependent launch": {"values_in_place": 1, "dependent": 1},
}


class Session:
    """One part of the run: where its results go, and on what it runs."""

    def __init__(self, out: Path, part: str, tiny: bool, baseline: Path | None):
        self.out, self.part, self.tiny = out, part, tiny
        self.device = "cpu" if tiny else "cuda"
        self.workloads = TINY_WORKLOADS if tiny else WORKLOADS
        self.libraries: dict[str, ctypes.CDLL] = {}
        if not tiny and _native.cuda_unavailable_reason(torch.device("cuda")) is None:
            for name in SWITCHES:
                self.libraries[name] = _native.cuda()
            if baseline is not None:
                self.libraries["baseline"] = ctypes.CDLL(str(baseline))

    def say(self, **row) -> None:
        text = json.dumps({"part": self.part, **row})
        with (self.out / "results.jsonl").open("a") as file:
            file.write(text + "\n")
        print(text, flush=True)

    def guarded(self, what: str, function: Callable):
        """function(), or a line that says what failed."""
        try:
            return function()
        except Exception as error:
            self.say(failed=what, error=f"{type(error).__name__}: {error}"[:300])

    def with_library(self, name: str, function: Callable) -> Callable:
        """`function` on that build of the CUDA library."""

        def call():
            library = self.libraries[name]
            _native._cuda = lambda: library
            for switch in sorted({switch for values in SWITCHES.values() for switch in values}):
                setter = getattr(library, f"comp_kernels_cuda_rope_attention_set_{switch}", None)
                if setter is not None:  # a baseline may be older
                    value = SWITCHES.get(name, {}).get(switch, 0)
                    setter(torch.cuda.get_device_properties(0).multi_processor_count if value < 0 else value)
            return function()

        return call

    def times(self, functions: dict[str, Callable], rounds: int = 15) -> dict[str, float]:
        """Median microseconds of each, in turn."""
        if self.tiny:
            return {name: 1e3 * time_once(function) for name, function in functions.items()}
        flush = torch.empty(128 << 20, dtype=torch.uint8, device=self.device)  # more than any L2 cache
        events: dict[str, list] = {name: [] for name in functions}
        for function in functions.values():
            function()
        self.wait()
        for _ in range(rounds):
            for name, function in functions.items():
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                events[name].append((start, end))
        self.wait()
        return {n: round(1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs), 1) for n, pairs in events.items()}

    def host_time(self, function: Callable, count: int = 10) -> float:
        """Microseconds until a call returns, nothing waiting for the device."""
        self.wait()  # an empty queue: launches never wait for room in it
        start = time.perf_counter()
        for _ in range(1 if self.tiny else count):
            function()
        elapsed = time.perf_counter() - start
        self.wait()
        return round(elapsed / (1 if self.tiny else count) * 1e6, 1)

    def kernels(self, function: Callable, count: int = 3) -> dict[str, float]:
        """Microseconds on the device of one call, by kernel, in a trace of torch's profiler; nothing on the CPU."""
        activity = torch.profiler.ProfilerActivity.CPU if self.tiny else torch.profiler.ProfilerActivity.CUDA
        function()
        with torch.profiler.profile(activities=[activity]) as profile:
            for _ in range(count):
                function()
            self.wait()
        found = {event.key[:80]: round(event.self_device_time_total / count, 1) for event in profile.key_averages()}
        return {name: us for name, us in found.items() if us > 0}

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def graph(self, function: Callable) -> Callable:
        """Replay of `function` as a CUDA graph; on the CPU the function."""
        return function if self.tiny else captured(function)


def captured(function: Callable) -> Callable:
    """`function`, whose tensors stay where they are, as a CUDA graph: a call replays it and returns its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()  # compiles, and allocates what is kept
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay():
        graph.replay()
        return results

    return replay


def time_once(function: Callable) -> float:
    """Milliseconds of one call: the clock of the dry run."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def backend_of(session: Session) -> str:
    return "cpu" if session.tiny else "cuda"


def backends_of(op: str, session: Session) -> list[str]:
    """All that can run `op` there; on a GPU not the kernels of the CPU."""
    return [name for name in ck.available_backends(op, session.device) if name != "cpu" or session.tiny]


def peak_memory(function: Callable, device: str) -> float | None:
    """MiB that a call takes at its peak above what was there; the CPU does not tell."""
    if device != "cuda":
        function()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def environment(tiny: bool) -> dict:
    """What every number has to stand beside."""
    rows = {"torch": torch.__version__, "device": "the CPU (a dry run: its times say nothing)"}
    if not tiny:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        rows["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        rows |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    try:
        import triton

        rows["triton"] = triton.__version__
    except ImportError:
        rows["triton"] = None
    rows["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return rows
