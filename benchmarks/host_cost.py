"""What one eager call costs on the host: Python, ctypes and C code up to the launches, in microseconds. No GPU is needed.

    python -m benchmarks.host_cost [--rounds 15]

Kernels are replaced by ones that do nothing: the CPU library's functions and the CUDA library's launches by a C function that
returns at once, Triton's launches by an empty Python function. So what Triton itself does per launch (finding the compiled
kernel) is not in these figures, nor is what torch takes to tell the current device and stream: the tensors lie on the CPU.
`benchmarks.gpu_session --parts host` makes the same calls on a GPU, with both. Small operations of torch around the launches do
run. sinkhorn does not look for infinite potentials, as it does for tensors on the CPU: nobody wrote these. alignment_loss has
its products from torch on the CPU, so only its Triton backend is here.

Times are processor time of the process, which a busy machine changes less than the clock on the wall; medians of rounds in
which all cases take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch

import comp_kernels as ck
from comp_kernels import _native
from comp_kernels._triton import launches_go_to
from comp_kernels.ops.sinkhorn import api as sinkhorn_api

CALLS = 100  # per case and round
LAYERS = 8
TOKENS, HEADS, HEAD_DIM = 64, 4, 64  # one small image: too little for a GPU to be what is waited for
ROWS, WORDS = 64, 4096


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Within, no kernel of any backend does anything, and all of them accept tensors on the CPU."""

    @functools.cache
    def cpu_function(name: str) -> Callable[[ctypes.Structure | bytes], None]:
        function = ctypes.pythonapi["Py_IsTrue"]  # compares a pointer: null for all but one, that is no message
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
        return functools.partial(_native.call, function)

    with contextlib.ExitStack() as stack:
        stack.enter_context(launches_go_to(lambda kernel, grid, *args, **kwargs: None, "sm_90"))
        stack.enter_context(mock.patch.object(_native, "cpu_function", cpu_function))
        stack.enter_context(mock.patch.object(sinkhorn_api, "readable", lambda x: False))  # potentials of what memory holds
        if cuda_is_built():
            set_hook = _native.cuda().comp_kernels_cuda_set_launch_hook
            set_hook.argtypes = [ctypes.c_void_p, ctypes.c_int32]
            set_hook(ctypes.cast(ctypes.pythonapi["Py_IsTrue"], ctypes.c_void_p), 90)
            stack.callback(set_hook, None, 0)
            stack.enter_context(mock.patch.object(_native, "cuda_unavailable_reason", lambda device: None))
        yield


def cuda_is_built() -> bool:
    try:
        _native.cuda()
    except _native.Unavailable:
        return False
    return True


class Case(NamedTuple):
    run: Callable  # without its results
    calls: int = 1  # of the operator, in one run


class NoKernel(torch.autograd.Function):
    """An autograd function that allocates, saves and returns what rope_attention's does, and does nothing else."""

    @staticmethod
    def forward(ctx, q, k, v, others):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64)
        ctx.save_for_backward(q, k, v, *others, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def attention(backend: str, device: str) -> dict[str, Case]:
    """forward: one call. both: eight, as the layers of a tower make them, and one backward pass through all of them: what torch
    takes to begin a backward pass is no cost of a call. Of the backend "torch alone" every call is a NoKernel."""
    dtype = torch.float32 if backend == "cpu" else torch.bfloat16
    q, k, v, grad = torch.randn(4, TOKENS, HEADS, HEAD_DIM, device=device, dtype=dtype)
    cos, sin = torch.randn(2, TOKENS, HEAD_DIM // 2, device=device)
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)
    calls = [[x.clone().requires_grad_() for x in (q, k, v)] for _ in range(LAYERS)]
    leaves, cotangents = [x for call in calls for x in call], [grad] * LAYERS

    def run(q, k, v):
        if backend == "torch alone":
            return NoKernel.apply(q, k, v, (cos, sin, None, None, bounds, None))
        return ck.rope_attention(q, k, v, cos, sin, bounds, backend=backend)

    def both():
        torch.autograd.grad([run(*call) for call in calls], leaves, cotangents)

    return {
        "forward": Case(lambda: run(q, k, v)),
        "both": Case(both, LAYERS),
    }


def sinkhorn(backend: str, device: str) -> dict[str, Case]:
    scores = torch.randn(ROWS, 128, device=device)
    return {"forward": Case(lambda: ck.sinkhorn(scores, epsilon=0.05, backend=backend))}


def alignment(backend: str, device: str) -> dict[str, Case]:
    vision, text, prototypes = (torch.randn(rows, HEAD_DIM, device=device) for rows in (ROWS, ROWS, WORDS))
    vision.requires_grad_()
    return {"both": Case(lambda: torch.autograd.grad(ck.alignment_loss(vision, text, prototypes, backend=backend), vision))}


def cases(device: str = "cpu", cpu: bool = True) -> dict[tuple[str, str, str], Case]:
    """(operator, backend, "forward" or "both") -> what is timed; cpu: with the kernels of the CPU."""
    found = {}
    for op, make in (("rope_attention", attention), ("sinkhorn", sinkhorn), ("alignment_loss", alignment)):
        for backend in ck.available_backends(op, device):
            if backend != "reference" and (backend != "cpu" or (cpu and op != "alignment_loss")):
                found |= {(op, backend, which): case for which, case in make(backend, device).items()}
    return {("rope_attention", "torch alone", "both"): attention("torch alone", device)["both"]} | found


def microseconds(case: Case, count: int) -> float:
    """Per call of the operator."""
    runs = max(count // case.calls, 1)
    start = time.process_time()
    for _ in range(runs):
        case.run()
    return (time.process_time() - start) / (runs * case.calls) * 1e6


def measure(rounds: int) -> dict[tuple[str, str, str], float]:
    """Median microseconds of every case, with kernels that do nothing."""
    with nothing_runs():
        found = cases()
        for case in found.values():
            microseconds(case, max(CALLS // 5, 1))
        times = [{name: microseconds(case, CALLS) for name, case in found.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] for row in times) for name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    torch.set_num_threads(1)
    print("| operator | backend | pass | microseconds |\n|---|---|---|---|")
    for (op, backend, which), us in measure(parser.parse_args().rounds).items():
        print(f"| {op} | {backend} | {which} | {us:.1f} |")


if __name__ == "__main__":
    main()
