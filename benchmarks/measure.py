"""Timing shared by all suites: peers interleaved with ours round by round, memory, errors, the machine's peak.

A shared or throttled machine changes its speed from second to second. So every round times ours and each peer once, one after
another, and only ratios of medians of the same run are worth quoting.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from comp_kernels import _native

from .peaks import fma_peak

SLOW_PEER = 5.0  # a peer that takes this many times as long is timed in the first two rounds only
CASE_SECONDS = 45.0  # once the rounds of a case have taken this long, so are all peers
SHORT_SECONDS, MOST_ROUNDS = 0.25, 41  # of ours: shorter calls get more rounds, up to so many, for their times scatter more


def compare(
    benchmark,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    *,
    group: str,
    case: str,
    operations: float | None = None,
    error: float | None = None,
    rounds: int = 7,
    calls: int = 1,
    dtype: torch.dtype = torch.float32,
    **extra,
) -> None:
    """Time `ours` with pytest-benchmark and every peer between its rounds; all results go to `benchmark.extra_info`.

    group, case:  row and table of the report. operations: floating-point operations of one call, for the share of the peak.
    error: the largest error against float64, measured by the caller. rounds: at least so many; short calls get more. calls:
    how many in a row one round times, ours and each peer's alike; several where a call is so short that the caches its
    predecessor left decide. pytest-benchmark's own table then shows the time of them all, everything else that of one.
    dtype: of the operands, for the peak. extra: anything else worth keeping.
    """
    timer = benchmark._timer  # --benchmark-timer: ours and the peers by the same clock
    first_calls = {name: _seconds(function, timer) for name, function in {"ours": ours, **peers}.items()}  # compiles, warms up
    warm_ours = _seconds(ours, timer, calls)
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def time_peers() -> None:
        late = time.monotonic() - begin > CASE_SECONDS
        for name, function in peers.items():
            if len(seconds[name]) < 2 or (not late and statistics.median(seconds[name]) < SLOW_PEER * warm_ours):
                seconds[name].append(_seconds(function, timer, calls))

    def ours_in_a_row() -> None:
        for _ in range(calls):
            ours()

    rounds = max(rounds, min(MOST_ROUNDS, int(SHORT_SECONDS / max(warm_ours * calls, 1e-9))))
    gc.collect()
    begin = time.monotonic()
    benchmark.pedantic(ours_in_a_row, setup=time_peers, rounds=rounds)
    milliseconds = benchmark.stats.stats.median / calls * 1e3
    info = {
        "group": group,
        "case": case,
        "ms": milliseconds,
        "peers_ms": {name: statistics.median(values) * 1e3 for name, values in seconds.items()},
        "best_ms": {
            "ours": benchmark.stats.stats.min / calls * 1e3,
            **{name: min(values) * 1e3 for name, values in seconds.items()},
        },
        "first_call_s": first_calls,
        "memory_mib": {name: peak_memory(function) for name, function in {"ours": ours, **peers}.items()},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": machine(),
        **extra,
    }
    if operations is not None:
        info["gflops"] = operations / milliseconds * 1e-6
        info["peak_gflops"] = fma_peak(dtype)
        info["peak_share"] = info["gflops"] / info["peak_gflops"]
    if error is not None:
        info["max_error"] = error
    benchmark.extra_info.update(info)
    print("\n" + describe(info))


def describe(info: dict) -> str:
    """One line for a person: time, rate, share of the peak, speed against each peer, memory, error."""
    parts = [f"{info['group']} {info['case']}: {info['ms']:.2f} ms"]
    if "gflops" in info:
        parts.append(f"{info['gflops']:.0f} GFLOP/s ({info['peak_share']:.0%} of the FMA peak)")
    best = info["best_ms"]
    parts += [
        f"{name} {ms / info['ms']:.2f}x (best rounds {best[name] / best['ours']:.2f}x)" for name, ms in info["peers_ms"].items()
    ]
    parts.append(f"{info['memory_mib']['ours']:.1f} MiB")
    if "max_error" in info:
        parts.append(f"error {info['max_error']:.1e}")
    return "  ".join(parts)


def _seconds(function: Callable[[], object], timer: Callable[[], float], calls: int = 1) -> float:
    """Per call, of so many in a row."""
    start = timer()
    for _ in range(calls):
        function()
    return (timer() - start) / calls


def peak_memory(function: Callable[[], object]) -> float:
    """MiB of resident memory that one call adds at its worst, results included. Linux alone; NaN elsewhere.

    Memory that the allocator kept from earlier calls is given back first, so that it counts again.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        result = function()
        peak = _status("VmHWM")
    except (OSError, AttributeError):
        return float("nan")
    del result
    return max(0, peak - before) / 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def available_gib() -> float:
    """Memory that programs can still take. Linux alone; infinite elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@functools.cache
def machine() -> str:
    """Processor and instruction set."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {_native.cpu().comp_kernels_cpu_isa().decode()}"
