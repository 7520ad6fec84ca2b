"""Launches of Triton kernels, in one place: on the device, in the interpreter, or wherever `launches_go_to` sends them.

Nothing here imports triton before a kernel is launched, so that `import comp_kernels` stays light.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator

import torch

from ._native import on_device

# Of every launch on a device. Fused multiply-adds are the default up to Triton 3.9, which warns that they will not be in 3.10.
OPTIONS = dict(enable_fp_fusion=True)

_redirection: tuple[str, Callable] | None = None  # (architecture, launcher)


def unavailable_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, in words for the user; None when they can."""
    if sys.modules.get("triton") is None and importlib.util.find_spec("triton") is None:  # to look for it takes a microsecond
        return "triton is not installed (pip install triton)"
    kind = device.type  # which takes a third of a microsecond
    if kind == "cpu" and _redirection is None and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton runs on GPUs; CPU tensors only in its slow interpreter (set TRITON_INTERPRET=1 before triton is imported)"
        )
    if kind not in ("cpu", "cuda"):
        return f"the Triton kernels were written for CUDA and ROCm devices, not for {kind}"
    return None


def architecture(device: torch.device) -> str:
    """What the kernels are compiled for: "sm_80", "sm_90", "gfx942", .. or "interpreter"."""
    if _redirection is not None:
        return _redirection[0]
    if device.type == "cpu":
        return "interpreter"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def dot_precision(arch: str, dtype: torch.dtype) -> str:
    """How tl.dot treats float32: three TF32 products per product on NVIDIA, as exact as float32 within a few roundings."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv and triton.next_power_of_2 serve kernels too, and take 1.4 us a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def alignment(*tiles: torch.Tensor) -> int:
    """The largest power of two up to 16 that divides the columns and all strides between rows of tiles of the same width: what
    kernels whose sizes are not specialised (`do_not_specialize`) have to be told for wide loads."""
    return alignment_of(*[(x.shape, x.stride()) for x in tiles])


@functools.lru_cache(maxsize=1024)
def alignment_of(*tiles: tuple[torch.Size, tuple[int, ...]]) -> int:
    """The same by their shapes and strides."""
    strides = (stride for shape, strides in tiles for size, stride in zip(shape[:-1], strides) if size > 1)
    return math.gcd(16, tiles[0][0][-1], *strides)


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 2, **constexprs) -> None:
    """Launch `kernel` on the device of its first tensor argument; an empty grid launches nothing."""
    if 0 in grid:
        return
    if _redirection is not None:
        _redirection[1](kernel, grid, *args, num_warps=num_warps, num_stages=num_stages, **constexprs)
        return
    first = next(x for x in args if isinstance(x, torch.Tensor))
    with on_device(first):
        if first.is_cuda and not torch.version.hip:
            launch_known((first.device.index, num_warps, num_stages), kernel, grid, args, constexprs)
        else:  # the interpreter; AMD's compiler asks for more than `look_of` tells
            kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **OPTIONS, **constexprs)


MAX_KNOWN = 4096
_known: dict[tuple, tuple] = {}
"""Launches by what Triton chooses a compiled kernel by -> that kernel, and the values of its constexprs."""


def launch_known(where: tuple[int, int, int], kernel, grid: tuple[int, ...], args: tuple, constexprs: dict) -> None:
    """Launch on the current device; where: its index, num_warps, num_stages.

    Triton finds the compiled kernel of a launch in 7 to 15 us. One that has been found is launched by itself, in 2, as in
    Triton's tutorial on softmax.
    """
    look = (kernel, where, *constexprs, *constexprs.values(), *look_of(args))
    known = _known.get(look)
    if known is not None:
        compiled, rest = known
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
        return
    _, num_warps, num_stages = where
    compiled = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **OPTIONS, **constexprs)
    if len(_known) >= MAX_KNOWN:
        _known.clear()
    _known[look] = compiled, tuple(constexprs[name] for name in kernel.arg_names[len(args) :])


def look_of(args: tuple) -> list:
    """All of the arguments that a compiled kernel may depend on: types, the last bits of addresses, and integers, which Triton
    looks at for being 1, a multiple of 16 and 32 bits wide."""
    found: list = []
    for x in args:
        if isinstance(x, torch.Tensor):
            found += (x.dtype, x.data_ptr() % 16)
        else:
            found.append(float if type(x) is float else x)
    return found


@contextlib.contextmanager
def launches_go_to(launcher: Callable, architecture: str) -> Iterator[None]:
    """Within the context, every launch calls launcher(kernel, grid, *args, num_warps=, num_stages=, **constexprs) instead.

    For tests and reports: a launcher may record the launches or run the compiled code on an emulator. `architecture` is
    what the launch configurations are chosen for.
    """
    global _redirection
    before, _redirection = _redirection, (architecture, launcher)
    try:
        yield
    finally:
        _redirection = before
