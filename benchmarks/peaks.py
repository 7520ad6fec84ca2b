"""What this processor does at best, over torch's threads: the yardsticks beside which the benchmarks put the CPU kernels."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from comp_kernels import _native
from comp_kernels._sources import CSRC, CXX_FLAGS, PAIRS_FLAGS, X86_FLAGS

SOURCE = Path(__file__).parent / "csrc" / "peaks.cpp"
BUILD = Path(__file__).parents[1] / "build"
PAIRS = {"avx512_bf16": torch.bfloat16, "amx": torch.bfloat16, "amx_bf16x3": None, "amx_fp16": torch.float16}
"""What the sets multiply that have products of one dtype alone. Of float32 on AMX the yardstick is float32's all the same."""


def fma_peak(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of float32 multiply-adds in registers, or of what `dtype` is multiplied with; measured anew, for the
    clock may have changed."""
    return _library(dtype).peak_multiply_add(torch.get_num_threads(), 5) * 1e-9


def exponential_rate() -> float:
    """Exponentials per second of the kernels' own exponential, of numbers in the first level cache."""
    return _library(torch.float32).peak_exponentials(torch.get_num_threads(), 5)


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """peaks.cpp, compiled as the kernels are, for the instruction set that multiplies `dtype`."""
    in_use = _native.cpu().comp_kernels_cpu_isa().decode().split()[0]
    up_to = _native.INSTRUCTION_SETS[: _native.INSTRUCTION_SETS.index(in_use) + 1]
    isa = [name for name in up_to if PAIRS.get(name, dtype) == dtype][-1]
    x86 = {**X86_FLAGS, **PAIRS_FLAGS}
    flags = [*CXX_FLAGS, *(x86[isa] if platform.machine() in ("x86_64", "AMD64") else []), f"-DCOMP_KERNELS_ISA={isa}"]
    headers = [*(CSRC / "common" / "cpu").glob("*.h"), *(CSRC / "rope_attention" / "cpu" / "kernels").glob("*.h")]
    text = b"".join(path.read_bytes() for path in [SOURCE, *sorted(headers)]) + " ".join(flags).encode()
    path = BUILD / f"peaks-{hashlib.sha256(text).hexdigest()[:12]}.so"
    if not path.exists():
        BUILD.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, *flags, "-shared", "-pthread", str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.replace(path)
    library = ctypes.CDLL(str(path))
    for function in (library.peak_multiply_add, library.peak_exponentials):
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64, ctypes.c_int64]
    return library
