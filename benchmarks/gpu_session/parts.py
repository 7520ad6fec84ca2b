"""The parts of a session, the most important first, and how each is run: in a process of its own, with its own time limit."""

from __future__ import annotations

import importlib
import os
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
    "build": Part("build.build", 45, 120, "the CUDA library, every object of it"),
    "check_attention": Part("checks.rope_attention", 80, 150, "tests/gpu: errors by backend and dtype, CUDA graphs, streams"),
    "check_sinkhorn": Part("checks.sinkhorn", 20, 45, "tests/gpu: sinkhorn"),
    "check_alignment": Part("checks.alignment_loss", 25, 60, "tests/gpu: alignment_loss"),
    "attention": Part("attention.attention", 60, 120, "rope_attention, eager and as a CUDA graph, forward and with backward"),
    "peers": Part("peers.peers", 120, 200, "other libraries with a compiled rotation on the workloads of rope_attention"),
    "sinkhorn": Part("sinkhorn.sinkhorn", 45, 75, "sinkhorn beside a copy, its peers; the projection of hyper-connections"),
    "alignment": Part("alignment.alignment", 45, 90, "alignment_loss in five precisions beside the plain version and Liger"),
    "towers": Part("towers.towers", 50, 120, "towers of transformers and timm: patched, with sdpa, with flash-attention"),
    "train": Part("train_job.train", 50, 120, "100 steps of the main job: first step, images/s, memory, share of attention"),
    "train_again": Part("train_job.train_again", 15, 40, "its start with a filled cache of Triton's"),
    "fsdp": Part("train_job.fsdp", 25, 60, "its steps sharded by FSDP2 over NCCL on one device, bfloat16"),
    "host": Part("host.host", 20, 60, "Python and C cost of a call of every operator and backend, not waiting for the device"),
    # What the first ten minutes have no room for unless those before are quicker than estimated; --parts asks for them.
    "kernels": Part("attention.kernels", 20, 60, "device time of every kernel of rope_attention, by torch's profiler"),
    "sanitizer": Part("sanitizer.run", 60, 150, "compute-sanitizer, where it is installed, over a few of tests/gpu"),
    "flex": Part("peers.compiled_peers", 60, 150, "flex_attention, compiled for every workload"),
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
            limit = min(max(end - start, 1), part.limit * (10 if session.tiny else 1))  # a dry run may be on a slow machine
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if session.tiny else {})
            try:
                status = subprocess.run(command, timeout=limit, env=environment).returncode
            except subprocess.TimeoutExpired:
                status = "out of time"
        failed += status != 0
        session.say(finished=name, status=status, seconds=round(time.monotonic() - start, 1))
    return failed
