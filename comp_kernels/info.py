"""What is built, what will be used here, and why: `python -m comp_kernels.info`."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys

import torch

from . import __version__, _native
from ._backends import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    IMPLEMENTATIONS,
    available_backends,
    choose_backend,
    failure,
    next_backend,
    unavailable_reason,
)


def cpu_library() -> list[str]:
    """Lines about the compiled CPU library."""
    try:
        library = _native.cpu()
    except _native.Unavailable as error:
        return [f"not usable: {error}"]
    pool = "torch's" if None not in _native.torch_thread_pool() else "none (this torch does not export its pool): one thread"
    return [
        f"{_native.LIB / 'libcomp_kernels_cpu.so'}",
        f"instruction set: {library.comp_kernels_cpu_isa().decode()}",
        f"thread pool: {pool}, {torch.get_num_threads()} threads",
    ]


def cuda_library() -> list[str]:
    """Lines about the compiled CUDA library."""
    try:
        library = _native.cuda()
    except _native.Unavailable as error:
        return [f"not built: {error}"]
    library.comp_kernels_cuda_architectures.restype = ctypes.c_char_p
    return [
        f"{_native.LIB / 'libcomp_kernels_cuda.so'}",
        f"compiled for: {library.comp_kernels_cuda_architectures().decode()}",
        "taken before Triton where they serve the call: measured faster on an H200 (docs/hardware)",
        "but for float32 and head dims above 128 of rope_attention, which have not run on a GPU: backend='cuda' takes them",
    ]


def devices() -> list[torch.device]:
    return [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def describe_operator(op: str, device: torch.device) -> list[str]:
    """Which backend `op` takes on `device` when none is named, and why not the others."""
    try:
        chosen, fallback = choose_backend(op, None, device)
        if fallback:
            chosen = next_backend(op, device)
    except (ValueError, RuntimeError) as error:  # what every call will say
        return [f"{op}: {error}"]
    others = [name for name in available_backends(op, device) if name != chosen]
    lines = [f"{op}: {chosen}" + (f" (also {', '.join(others)})" if others else "")]
    for name in BACKENDS:
        if reason := unavailable_reason(op, name, device):
            lines.append(f"    not {name}: {reason}")
        elif reason := failure(op, name, device):
            lines.append(f"    not {name} in this process, its kernels could not be compiled or launched: {reason}")
    return lines


def report() -> str:
    """The whole report as text."""
    lines = [
        f"comp_kernels {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}, {platform.machine()}",
        f"{ENVIRONMENT_VARIABLE}: {os.environ.get(ENVIRONMENT_VARIABLE) or 'not set'}",
        "",
        "compiled CPU library",
        *(f"  {line}" for line in cpu_library()),
        "",
        "compiled CUDA library",
        *(f"  {line}" for line in cuda_library()),
    ]
    for device in devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        lines += ["", f"{device} ({name})"]
        lines += [f"  {line}" for op in IMPLEMENTATIONS for line in describe_operator(op, device)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m comp_kernels.info", description=__doc__).parse_args(arguments)
    print(report())


if __name__ == "__main__":
    main()
