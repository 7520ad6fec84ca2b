"""Runs the host code of csrc/cuda as it is and its kernels on ptx_emulator: tensors stay on the CPU, no GPU is needed."""

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

import pytest
import torch
from emulation import emulator_missing, import_emulator

from comp_kernels import _native

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HOOK = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_int64
)  # LaunchHook of csrc/cuda/launch.cu

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


@cache
def source_of(kernel: str) -> tuple[str, str]:
    """File (relative to csrc/cuda) and architecture that define a kernel, from its name."""
    if found := re.fullmatch(r"rope_attention_forward_sm90_\w+?_(\d+)", kernel):
        return f"instantiations/forward_sm90_{found[1]}.cu", "sm_90a"
    if found := re.fullmatch(r"rope_attention_backward_sm90_\w+?_(\d+)", kernel):
        return f"instantiations/backward_sm90_{found[1]}.cu", "sm_90a"
    if kernel.startswith("rope_attention_prepare_sm90"):
        return "instantiations/prepare_sm90_all.cu", "sm_90a"
    if found := re.fullmatch(r"rope_attention_short_(forward|backward)_[a-z0-9]+_(\d+)_\d+", kernel):
        return f"instantiations/short_{found[1]}_{found[2]}.cu", "sm_80"
    if found := re.fullmatch(r"rope_attention_(forward|backward)_\w+?_(\d+)", kernel):
        return f"instantiations/{found[1]}_{found[2]}.cu", "sm_80"
    if kernel.startswith("rope_attention_prepare"):
        return "instantiations/prepare.cu", "sm_80"
    if kernel.startswith("rope_attention_images"):
        return "instantiations/images.cu", "sm_80"
    if kernel.startswith("sinkhorn_small"):
        return "instantiations/sinkhorn_small.cu", "sm_80"
    return "instantiations/sinkhorn_passes.cu", "sm_80"


@cache
def module(source: str, arch: str):
    """The PTX of one file, ready to run. Compiled once per state of csrc (a second or two), whichever process comes first."""
    digest = hashlib.sha256(arch.encode())
    for path in sorted([*CSRC.glob("include/**/*.h"), *CSRC.glob("cuda/**/*.*h"), CSRC / "cuda" / source]):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"comp_kernels_ptx_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    ptx = folder / f"{Path(source).stem}_{digest.hexdigest()[:20]}.ptx"
    if not ptx.exists():
        unfinished = ptx.with_suffix(f".{os.getpid()}")
        command = ["nvcc", "-ptx", f"-arch={arch}", "-std=c++17", "-lineinfo", f"-I{CSRC / 'include'}", "-o", str(unfinished)]
        subprocess.run([*command, str(CSRC / "cuda" / source)], check=True)
        unfinished.replace(ptx)
    return import_emulator().load(ptx.read_text(), source)


@contextmanager
def launches_on_emulator(reports: list | None = None, capability: int = 80, short: int = 0, **options):
    """Within: the cuda backend accepts CPU tensors and its kernels run on the emulator.

    A kernel may touch the tensors whose address was taken, and no byte more; memory from new_empty is filled with NaN, so
    that what was not written cannot pass. reports: receives (kernel name, report) of every launch. capability: of the device
    that is pretended, 80 or 90. short: average length up to which the kernels for short sequences
    serve. options: see ptx_emulator.
    """
    buffers, failures = {}, []
    library = _native.cuda()
    library.comp_kernels_cuda_set_launch_hook.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    set_short = library.comp_kernels_cuda_rope_attention_set_short
    set_short.argtypes, set_short.restype = [ctypes.c_int32], None

    def launch(kernel, grid_x, grid_y, threads, shared_bytes, params, params_bytes):
        name = kernel.decode()
        arguments = [ctypes.string_at(params, params_bytes)]
        try:
            loaded = module(*source_of(name)).kernel(name)
            report = loaded.launch(
                (grid_x, grid_y), threads, arguments, shared=shared_bytes, buffers=list(buffers.values()), **options
            )
        except Exception as error:  # must not pass through C
            failures.append(error)
            return ctypes.cast(REFUSED, ctypes.c_void_p).value
        if reports is not None:
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
        set_short(short)
        try:
            yield
        except RuntimeError:
            if failures:
                raise failures[0] from None
            raise
        finally:
            library.comp_kernels_cuda_set_launch_hook(None, 0)
            set_short(0)
