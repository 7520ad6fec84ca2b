"""The parts of a session, the most important first, and how each is run: in a process of its own, with its own time limit."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .session import Session


class Part(NamedTuple):
    function: str  # "module.function" of this package, called with a Session
    estimate: float  # seconds it should take on an H200 (guessed until measured); it is not begun where less is left
    limit: float  # seconds after which it is ended
    what: str


PARTS = {
    "checks": Part("checks.checks", 60, 120, "rope_attention against float64 in 16-bit dtypes, equal bits from run to run"),
    "attention": Part("attention.attention", 60, 120, "rope_attention, eager and as a CUDA graph, forward and with backward"),
    "kernels": Part("attention.kernels", 30, 60, "device time of every kernel of rope_attention, by torch's profiler"),
    "host": Part("host.host", 30, 60, "Python and C cost of a call of every operator and backend, not waiting for the device"),
    "sinkhorn": Part("sinkhorn.sinkhorn", 30, 60, "sinkhorn beside a copy of its matrix, the projection of hyper-connections"),
    "alignment": Part("alignment.alignment", 45, 90, "alignment_loss in four precisions beside the plain version and Liger"),
    "peers": Part("peers.peers", 150, 240, "other libraries with a compiled rotation on the workloads of rope_attention"),
}


def run_part(session: Session) -> None:
    """The part that the session is of, in this process."""
    module, function = PARTS[session.part].function.split(".")
    getattr(importlib.import_module(f".{module}", __package__), function)(session)


def run_parts(names: list[str], session: Session, minutes: float, baseline: Path | None = None) -> int:
    """Every part in a process of its own; returns how many did not finish. One that fails or hangs does not stop the next, and
    one that would not fit into what is left of the time is left out for those after it that may."""
    end, failed = time.monotonic() + 60 * minutes, 0
    for name in names:
        part, start = PARTS[name], time.monotonic()
        if end - start < part.estimate and not session.tiny:
            status = f"left out: {end - start:.0f} s are left, about {part.estimate:.0f} are needed"
        else:
            command = [sys.executable, "-m", __package__, "--out", str(session.out), "--part", name]
            command += ["--dry-run"] * session.tiny
            command += ["--baseline", str(baseline)] if baseline else []
            try:
                status = subprocess.run(command, timeout=min(max(end - start, 1), part.limit)).returncode
            except subprocess.TimeoutExpired:
                status = "out of time"
        failed += status != 0
        session.say(finished=name, status=status, seconds=round(time.monotonic() - start, 1))
    return failed
