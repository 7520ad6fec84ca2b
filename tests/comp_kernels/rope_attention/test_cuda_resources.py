"""What the built CUDA kernels of rope_attention take of a multiprocessor: shared memory that every device they serve grants,
next to no register spilled. Read from the library's machine code and the launches of its host code; nothing runs."""

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import triton
from cuda_emulation import HOOK, needs_cuda_emulation, switch

from comp_kernels import _native
from comp_kernels.ops.rope_attention import native

# KiB of shared memory that one block may have, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
HEAD_DIMS = (8, 32, 40, 64, 72, 80, 88, 96, 128, 136, 192, 200, 256)
MOST_STACK = 32  # bytes a thread spills; most kernels none, docs/kernels/rope_attention_cuda.md
# DTYPE_CODES, tf32
PRECISIONS = {"float32": (0, 0), "tf32": (0, 1), "bfloat16": (2, 0), "float16": (3, 0)}


def launches(capability: int, head_dim: int, precision: str, rows: int) -> dict[str, tuple[int, int]]:
    """Kernel -> (threads, dynamic shared bytes) of a forward and a backward call of two sequences."""
    found = {}

    def note(kernel, grid_x, grid_y, threads, shared_bytes, kind, params, params_bytes):
        found[kernel.decode()] = threads, shared_bytes

    library, hook = _native.cuda(), HOOK(note)
    dtype, tf32 = PRECISIONS[precision]
    pointers = {name: 4096 for name, kind in native.Params._fields_ if kind is ctypes.c_void_p}
    params = native.Params(
        **pointers, dtype=dtype, tf32=tf32, head_dim=head_dim, num_heads=2, num_heads_k=2, num_sequences=2, num_tokens=2 * rows,
        num_tokens_k=2 * rows, rotary_dim=head_dim, pair_stride=head_dim // 2, table_width=head_dim, table_heads=1,
        table_heads_k=1, scale=1.0,
    )  # fmt: skip
    library.comp_kernels_cuda_set_launch_hook.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.comp_kernels_cuda_set_launch_hook(ctypes.cast(hook, ctypes.c_void_p), capability)
    try:
        for short in (0, 1024):
            switch(short=short)
            for which in ("forward", "backward"):
                function = getattr(library, f"comp_kernels_cuda_rope_attention_{which}")
                function.argtypes = [ctypes.POINTER(native.Params), ctypes.c_void_p, ctypes.c_void_p]
                function.restype = ctypes.c_char_p
                _native.call(function, params, 4096, None)
    finally:
        switch()
        library.comp_kernels_cuda_set_launch_hook(None, 0)
    return found


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> REG, STACK, SHARED, LOCAL of the built library, as cuobjdump has them."""
    tool = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(_native.LIB / "libcomp_kernels_cuda.so")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, arch = {}, ""
    for line in listing.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            kernel = match[1]
        elif line.startswith("  REG:"):
            found[kernel, arch] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def declared(arch: str, code: dict[str, int]) -> int:
    """Static shared bytes. Machine code for 9.0 counts the KiB that the driver keeps of every block as well, which is not of
    those that a block may have."""
    return max(code["SHARED"] - (1024 if arch.startswith("sm_9") else 0), 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", SHARED_KIB)
@needs_cuda_emulation
def test_shared_memory_and_registers(capability, precision):
    compiled = resources()
    for head_dim in HEAD_DIMS:
        for rows in (20, 200, 400):
            for kernel, (threads, dynamic) in launches(capability, head_dim, precision, rows).items():
                code = {arch: x for (name, arch), x in compiled.items() if name == kernel}
                static = max((declared(arch, x) for arch, x in code.items()), default=0)
                assert dynamic + static <= SHARED_KIB[capability] * 1024, (kernel, capability)
                for arch, x in code.items():
                    assert x["REG"] * threads <= 65536, (kernel, arch)
                    assert x["STACK"] <= MOST_STACK, (kernel, arch)
