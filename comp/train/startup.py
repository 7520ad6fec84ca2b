"""What a run says about where its time goes: when each part of the start was done, and what Triton compiles."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from comp_kernels import _triton

IMPORTED = time.monotonic()


def process_age() -> float:
    """Seconds since this process began, imports included; on systems without /proc, since this module was imported."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # ticks after the machine's start
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.monotonic() - IMPORTED


class Startup:
    """Lines with the age of the process in front: `[  4.1 s] models loaded`."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.device, self.enabled = device, enabled
        self._stepped = False
        self._compiled = 0

    def say(self, text: str) -> None:
        if self.enabled:
            tqdm.write(f"[{process_age():6.1f} s] {text}", file=sys.stderr)

    def step_done(self) -> None:
        """To be called after every step; the first is said."""
        if not self._stepped:
            self.say("first step done")
        self._stepped = True

    @contextlib.contextmanager
    def compilations_said(self) -> Iterator[None]:
        """Within the context every kernel that Triton compiles, and does not find in its cache, is said when it is done."""
        if not self.enabled or self.device.type != "cuda" or _triton.unavailable_reason(self.device) is not None:
            yield
            return
        from comp_kernels._triton_compile import compilations_go_to

        with compilations_go_to(self.compiled):
            yield

    def compiled(self, kernel: str, arch: str, seconds: float, from_cache: bool) -> None:
        if from_cache:
            return
        once = "; kept for later runs, and `python -m comp.warm_up` does it before a run" if self._compiled == 0 else ""
        self._compiled += 1
        self.say(f"Triton compiled {kernel} for {arch} in {seconds:.1f} s{once}")
