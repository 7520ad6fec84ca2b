"""Runs the host code of csrc/*/cuda as it is and its kernels on ptx_emulator: tensors stay on the CPU, no GPU is needed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulation import emulator_missing, import_emulator

from comp_kernels import _native
from comp_kernels._sources import CSRC, INCLUDES

HOOK = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_int64] * 5, ctypes.c_void_p, ctypes.c_int64
)  # LaunchHook of csrc/common/cuda/launch.cu

PLAIN, COOPERATIVE, DEPENDENT = 0, 1, 2  # LaunchKind there

SMALL = (8, 100 * 1024, True)  # a device whose blocks the emulator can hold all at once; those of today have a hundred

REFUSED = ctypes.c_char_p(b"the emulator refused the kernel")


def missing() -> str | None:
    """Why the CUDA kernels cannot be executed here, for a skip; None when they can."""
    try:
        _native.cuda()
    except _native.Unavailable as error:
        return f"{error}"
    if shutil.which("nvcc") is None:
        return "nvcc is not installed: kernels are not compiled to PTX"
    return emulator_missing()


needs_cuda_emulation = pytest.mark.skipif(missing() is not None, reason=missing() or "")


class Source(NamedTuple):
    """What a kernel is compiled from."""

    path: Path
    arch: str
    flags: tuple[str, ...] = ()


@cache
def source_of(kernel: str) -> Source:
    """The file of csrc that defines a kernel, from its name."""
    if found := re.fullmatch(r"rope_attention_((?:forward|backward|persistent)_sm90)_\w+?_(\d+)", kernel):
        return attention_source(found[1], found[2])
    if found := re.fullmatch(r"rope_attention_(short_(?:forward|backward))_[a-z0-9]+_(\d+)_\d+", kernel):
        return attention_source(found[1], found[2])
    if found := re.fullmatch(r"rope_attention_(forward|backward)_\w*tf32(?:x3)?_(\d+)", kernel):
        return attention_source(f"{found[1]}_f32", found[2])
    if found := re.fullmatch(r"rope_attention_(forward|backward)_\w+?_(\d+)", kernel):
        return attention_source(found[1], found[2])
    if kernel.startswith("rope_attention_prepare_persistent"):
        return attention_source("prepare_persistent_sm90")
    if kernel.startswith("rope_attention_images"):
        return attention_source("images_sm90")
    if found := re.match(r"rope_attention_(prepare_sm90|prepare)", kernel):
        return attention_source(found[1])
    file = next((name for name in ("small", "resident") if kernel.startswith(f"sinkhorn_{name}")), "passes")
    return Source(CSRC / "sinkhorn" / "cuda" / f"{file}.cu", "sm_80")


def attention_source(file: str, head_size: object = None) -> Source:
    """csrc/rope_attention/cuda/{file}.cu, for one head size where it is compiled once for each."""
    flags = () if head_size is None else (f"-DHEAD_DIM={head_size}",)
    return Source(CSRC / "rope_attention" / "cuda" / f"{file}.cu", "sm_90a" if file.endswith("_sm90") else "sm_80", flags)


@cache
def module(source: Source):
    """The PTX of one file, ready to run. Compiled once per state of csrc (a second or two), whichever process comes first."""
    digest = hashlib.sha256(f"{source.arch} {source.flags}".encode())
    for path in sorted([*CSRC.glob("include/**/*.h"), *CSRC.glob("*/cuda/*.*h"), source.path]):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"comp_kernels_ptx_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    ptx = folder / f"{source.path.stem}_{digest.hexdigest()[:20]}.ptx"
    if not ptx.exists():
        unfinished = ptx.with_suffix(f".{os.getpid()}")
        command = ["nvcc", "-ptx", f"-arch={source.arch}", "-std=c++17", "-lineinfo", *INCLUDES, *source.flags]
        subprocess.run([*command, "-o", str(unfinished), str(source.path)], check=True)
        unfinished.replace(ptx)
    return import_emulator().load(ptx.read_text(), source.path.name)


def switch(**values: int) -> None:
    """Sets what chooses between the kernels of rope_attention, comp_kernels_cuda_rope_attention_set_*; what is not named: 0."""
    for name in ("short", "persistent", "dependent", "values_in_place"):
        function = getattr(_native.cuda(), f"comp_kernels_cuda_rope_attention_set_{name}")
        function.argtypes, function.restype = [ctypes.c_int32], None
        function(int(values.get(name, 0)))


class Launch(NamedTuple):
    """One launch as the host made it: what a CUDA graph would keep of it."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    kind: int  # COOPERATIVE: all blocks at once; DEPENDENT: before the launch before has ended
    params: bytes

    def run(self, buffers: list, after: list | None = None, **options):
        """after: what the launches before may still be writing."""
        kernel = module(source_of(self.kernel)).kernel(self.kernel)
        options |= dict(shared=self.shared_bytes, buffers=buffers, cooperative=self.kind == COOPERATIVE)
        options |= dict(after=after if self.kind == DEPENDENT else None)
        return kernel.launch(self.grid, self.threads, [self.params], **options)


class Clear(NamedTuple):
    """Zeros that the host orders in the stream."""

    address: int
    size: int

    def run(self, buffers: list, after: list | None = None, **options) -> None:
        ctypes.memset(self.address, 0, self.size)


class Recording:
    """The launches of `launches_on_emulator(recording=...)`, to be replayed as a CUDA graph does: the same params, the same
    addresses, whatever the tensors behind them hold by then."""

    def __init__(self):
        self.launches: list[Launch | Clear] = []
        self.buffers: dict = {}

    def replay(self, **options) -> None:
        for launch in self.launches:
            launch.run(list(self.buffers.values()), **options)


@contextmanager
def launches_on_emulator(
    reports: list | None = None,
    capability: int = 80,
    short: int = 0,
    recording: Recording | None = None,
    persistent: int = 0,
    dependent: bool = False,
    values_in_place: bool = False,
    device: tuple[int, int, bool] = SMALL,
    **options,
):
    """Within: the cuda backend accepts CPU tensors and its kernels run on the emulator.

    A kernel may touch the tensors whose address was taken, and no byte more; memory from new_empty is filled with NaN, so
    that what was not written cannot pass. reports: receives (kernel name, report) of every launch. capability: of the device
    that is pretended, 80 or 90. short: average length up to which the kernels for short sequences serve. persistent: blocks of
    the persistent forward; 0: the other one. dependent: sm_90a kernels start before those that prepare for them have ended;
    they may not read what these write, nor write, before they have waited. values_in_place: the sm_90a forward reads values
    where they are. device: its multiprocessors, shared bytes per block, and whether it has cooperative launches, whose blocks
    all run interleaved. recording: receives all launches. options: see ptx_emulator.
    """
    buffers, failures = {} if recording is None else recording.buffers, []
    library = _native.cuda()
    library.comp_kernels_cuda_set_launch_hook.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    written: list = []  # by the launches that may still run when a dependent one starts

    def launch(kernel, grid_x, grid_y, threads, shared_bytes, kind, params, params_bytes):
        name = kernel.decode()
        if name == "clear":
            this = Clear(params, params_bytes)
        else:
            this = Launch(name, (grid_x, grid_y), threads, shared_bytes, kind, ctypes.string_at(params, params_bytes))
        if recording is not None:
            recording.launches.append(this)
        if kind != DEPENDENT:
            written.clear()
        try:
            report = this.run(list(buffers.values()), written, **options)
            if dependent and report is not None:
                written.extend(report.written())
        except Exception as error:  # must not pass through C
            failures.append(error)
            return ctypes.cast(REFUSED, ctypes.c_void_p).value
        if reports is not None and report is not None:
            reports.append((name, report))
        return None

    def data_ptr(self):
        address = original_data_ptr(self)
        buffers[address, self.shape, self.stride()] = self
        return address

    def new_empty(self, *args, **kwargs):
        x = original_new_empty(self, *args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else 255)

    original_data_ptr, original_new_empty = torch.Tensor.data_ptr, torch.Tensor.new_empty
    hook = HOOK(launch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "data_ptr", data_ptr)
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(_native, "cuda_unavailable_reason", lambda device: None)
        library.comp_kernels_cuda_set_launch_hook(ctypes.cast(hook, ctypes.c_void_p), capability)
        library.comp_kernels_cuda_set_hook_device(*device)
        switch(short=short, persistent=persistent, dependent=dependent, values_in_place=values_in_place)
        try:
            yield
        except RuntimeError:
            if failures:
                raise failures[0] from None
            raise
        finally:
            library.comp_kernels_cuda_set_launch_hook(None, 0)
            switch()
