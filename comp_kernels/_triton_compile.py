"""Triton kernels for GPUs that need not be there: launches recorded instead of made, then compiled.

    launches = record(lambda: rope_attention(q, k, v, backend="triton"), "sm_90")
    compile_launch(launches[0], "sm_90")  # into Triton's cache, where the launch itself will find it

Both ways on go through `kernel.warmup`, Triton's own launch that ends before the device: what a kernel is specialised on is
Triton's answer, not a copy of its rules.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ._triton import OPTIONS, launches_go_to


@dataclass(frozen=True)
class Pointer:
    """A tensor argument, as far as Triton compiles for it: no memory behind it."""

    dtype: torch.dtype
    address: int  # modulo 16
    num_bytes: int  # of the storage; AMD's compiler addresses less than 2 GiB in 32 bits

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return self.num_bytes


@dataclass(frozen=True)
class Launch:
    """One kernel launch: enough to compile the kernel as it would be compiled on a device."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constexprs: dict
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def __reduce__(self):
        where = self.kernel.__module__, self.kernel.__name__  # a kernel has locks; its module is imported instead
        return _launch_of, (*where, self.grid, self.args, self.constexprs, self.num_warps, self.num_stages)


def _launch_of(module: str, kernel: str, *launch) -> Launch:
    return Launch(getattr(importlib.import_module(module), kernel), *launch)


def record(call: Callable[[], object], arch: str) -> list[Launch]:
    """The launches that `call` makes on `arch` ("sm_90", "gfx942", ..), with tensors on the CPU; nothing runs, so their
    results are whatever memory held."""
    launches = []

    def recorder(kernel, grid, *args, num_warps, num_stages, **constexprs):
        args = tuple(_pointer(x) if isinstance(x, torch.Tensor) else x for x in args)
        launches.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))

    with launches_go_to(recorder, arch):
        call()
    return launches


def _pointer(x: torch.Tensor) -> Pointer:
    return Pointer(x.dtype, x.data_ptr() % 16, x.untyped_storage().nbytes())


class _Target:
    """Stands in for Triton's driver, with a target to compile for instead of a device."""

    def __init__(self, arch: str, in_memory: object) -> None:
        self.arch, self.in_memory = arch, in_memory

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.arch[3:]), 32) if self.arch.startswith("sm_") else GPUTarget("hip", self.arch, 64)

    def get_current_device(self) -> object:
        """What Triton keeps compiled kernels in memory under."""
        return self.in_memory

    def get_current_stream(self, device: object) -> None:
        return None


@contextlib.contextmanager
def _compiling_for(arch: str, in_memory: object) -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Target(arch, in_memory))
    try:
        yield
    finally:
        driver.set_active(before)


def _warm_up(launch: Launch):
    return launch.kernel.warmup(
        *launch.args, grid=launch.grid, num_warps=launch.num_warps, num_stages=launch.num_stages, **OPTIONS, **launch.constexprs
    )


def compile_launch(launch: Launch, arch: str):
    """Triton's compiled kernel for `launch` on `arch`, from Triton's cache where that has it."""
    with _compiling_for(arch, arch):
        return _warm_up(launch)


def specialization(launch: Launch, arch: str) -> tuple[str, str]:
    """(name of the kernel, Triton's key): Triton compiles a kernel once per key, whatever else differs between two launches."""
    from triton import knobs

    keys = []

    def stop_before_compiling(*, key, **_) -> bool:
        keys.append(key)
        return True

    with knobs.runtime.scope(), _compiling_for(arch, ("never compiled", arch)):
        knobs.runtime.jit_cache_hook = stop_before_compiling
        _warm_up(launch)
    return launch.name, keys[0]


# --- into Triton's cache, ahead of time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """One kernel in Triton's cache."""

    name: str
    hash: str
    seconds: float
    from_cache: bool  # it had been compiled before


def compile_ahead(launches: Iterable[Launch], arch: str, jobs: int | None = None) -> Iterator[Compiled]:
    """Compile what `launches` need on `arch` into Triton's cache, each kernel once, in `jobs` processes (default: the cores).

    Yields them as they are done. Errors of the compiler are raised.
    """
    different = list({specialization(launch, arch): launch for launch in launches}.values())
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(different))
    if jobs <= 1:
        yield from (_compile_and_time(launch, arch) for launch in different)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_and_time, different, [arch] * len(different))


def _compile_and_time(launch: Launch, arch: str) -> Compiled:
    found = []
    # Under a key of its own: a kernel that this process has in memory need not be in the cache on disk.
    with compilations_go_to(lambda *facts: found.append(facts)), _compiling_for(arch, object()):
        hash_ = _warm_up(launch).hash
    name, _, seconds, from_cache = found[-1]
    return Compiled(name, hash_, seconds, from_cache)


@contextlib.contextmanager
def compilations_go_to(listener: Callable[[str, str, float, bool], object]) -> Iterator[None]:
    """Within the context, listener(kernel, architecture, seconds, from_cache) is called whenever a kernel was compiled or read
    from Triton's cache, and so is the listener that was set before."""
    from triton import knobs

    before = knobs.compilation.listener

    def listen(*, src, metadata, metadata_group, times, cache_hit):
        if before is not None:
            before(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)
        target = metadata["target"]
        arch = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
        listener(metadata["name"], arch, times.total / 1e6, cache_hit)

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = before
