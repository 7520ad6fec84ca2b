"""The device under test: a GPU where there is one, else the CPU, on which what only a GPU has is done the plain way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

import comp_kernels as ck
from benchmarks.gpu_session.session import captured as cuda_graph

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def kernels_of(op: str) -> list[str]:
    """Backends with kernels for the device; Triton's interpreter is none."""
    wanted = ("cuda", "triton") if HAS_GPU else ("cpu",)
    return [name for name in wanted if name in ck.available_backends(op, DEVICE)]


def captured(function: Callable) -> Callable:
    """`function` as a CUDA graph, see benchmarks; on the CPU the function itself."""
    return cuda_graph(function) if HAS_GPU else function


def check_nothing_waits(step: Callable) -> None:
    """On a GPU, that a step which has run once does not wait for the device."""
    step()
    if not HAS_GPU:
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def streams(count: int) -> list[contextlib.AbstractContextManager]:
    """Contexts in which work is queued side by side."""
    return [torch.cuda.stream(torch.cuda.Stream()) if HAS_GPU else contextlib.nullcontext() for _ in range(count)]


def wait() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()
