"""The device under test: a GPU where there is one, else the CPU, on which what only a GPU has is done the plain way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

import comp_kernels as ck

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def kernels_of(op: str) -> list[str]:
    """Backends with kernels for the device; Triton's interpreter is none."""
    wanted = ("cuda", "triton") if HAS_GPU else ("cpu",)
    return [name for name in wanted if name in ck.available_backends(op, DEVICE)]


def captured(function: Callable) -> Callable:
    """`function`, whose tensors stay where they are, as a CUDA graph: a call replays it and returns its results. On the CPU the
    function itself."""
    if not HAS_GPU:
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # compiles, and allocates what is kept
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay():
        graph.replay()
        return results

    return replay


def streams(count: int) -> list[contextlib.AbstractContextManager]:
    """Contexts in which work is queued side by side."""
    return [torch.cuda.stream(torch.cuda.Stream()) if HAS_GPU else contextlib.nullcontext() for _ in range(count)]


def wait() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()
