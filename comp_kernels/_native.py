"""Loads the compiled libraries (C ABI, see csrc) and says plainly what is missing when one cannot be used.

The libraries know nothing of torch: tensors cross as pointers, sizes and strides in a params struct. Threads are torch's own,
through the C symbols of libtorch_cpu, so `torch.set_num_threads` governs the kernels and two pools never compete.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ._sources import fingerprint

LIB = Path(__file__).parent / "lib"

# dtype codes of csrc/include
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_bf16x3", "amx_fp16")
"""What COMP_KERNELS_CPU_ISA may name, as in csrc/common/cpu/isa.cpp, which reads it."""


_HERE = contextlib.nullcontext()


class Unavailable(Exception):
    """A compiled library cannot be used; the message says why and what to do."""


def load(name: str) -> ctypes.CDLL:
    """Open comp_kernels/lib/libcomp_kernels_{name}.so; raises Unavailable with a remedy."""
    path = LIB / f"libcomp_kernels_{name}.so"
    rebuild = "reinstall comp-kernels or run `python setup.py build_native` in its source tree"
    if not path.exists():
        reason = LIB / f"{name}.missing"
        why = reason.read_text() if reason.exists() else f"{path} does not exist"
        raise Unavailable(f"the compiled {name} library is missing ({why}); {rebuild}")
    built_from = LIB / f"{name}.sources"
    if fingerprint(name) not in (None, built_from.read_text() if built_from.exists() else ""):
        raise Unavailable(f"the compiled {name} library was built from other sources than those in csrc; {rebuild}")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled {name} library does not load ({error}); {rebuild}") from error


def _usable(library: ctypes.CDLL | Unavailable) -> ctypes.CDLL:
    if isinstance(library, Unavailable):
        raise library
    return library


@functools.cache
def _cpu() -> ctypes.CDLL | Unavailable:
    try:
        library = load("cpu")
    except Unavailable as error:
        warnings.warn(f"comp_kernels: {error}. The slow reference backend is used on the CPU.", stacklevel=2)
        return error
    wanted = os.environ.get("COMP_KERNELS_CPU_ISA", "")
    if wanted not in ("", *INSTRUCTION_SETS):
        raise ValueError(f"COMP_KERNELS_CPU_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got {wanted!r}")
    return with_torch_threads(library)


def with_torch_threads(library: ctypes.CDLL) -> ctypes.CDLL:
    """A build of the CPU library, with torch's thread pool handed to it."""
    library.comp_kernels_cpu_isa.restype = ctypes.c_char_p
    library.comp_kernels_cpu_set_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.comp_kernels_cpu_set_threads.restype = None
    library.comp_kernels_cpu_set_threads(*torch_thread_pool())
    return library


def cpu() -> ctypes.CDLL:
    """The CPU library, with torch's thread pool handed to it; raises Unavailable."""
    return _usable(_cpu())


def cpu_unavailable_reason() -> str | None:
    """Why the CPU library cannot be used here, or None. The first call warns when it is missing."""
    library = _cpu()
    return str(library) if isinstance(library, Unavailable) else None


@functools.cache
def _cuda() -> ctypes.CDLL | Unavailable:
    try:
        return load("cuda")
    except Unavailable as error:
        return error


def cuda() -> ctypes.CDLL:
    """The CUDA library; it loads without a driver, launching needs one. Raises Unavailable."""
    return _usable(_cuda())


_serving: set[torch.device] = set()  # GPUs that the CUDA library runs on: torch takes microseconds to tell


def cuda_unavailable_reason(device: torch.device) -> str | None:
    """Why the CUDA library cannot run on `device`, or None."""
    if device in _serving:
        return None
    if device.type != "cuda":
        return f"the cuda backend needs tensors on a CUDA device, not on {device}"
    if torch.version.hip is not None:
        return "the cuda backend needs an NVIDIA device, this torch is built for ROCm"
    if isinstance(_cuda(), Unavailable):
        return str(_cuda())
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability 8.0 or later is needed, {device} has {major}.{minor}"
    if device.index is not None:  # else it is whichever is current
        _serving.add(device)
    return None


def stream(x: Tensor) -> int:
    """The cudaStream_t that torch uses on the device of `x`; 0 (the default stream) on the CPU, where only emulators launch."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Within, the device of `x` is CUDA's current one. To change it takes microseconds, and seldom does it have to."""
    here = not x.is_cuda or torch.cuda.current_device() == x.device.index
    return _HERE if here else torch.cuda.device(x.device)


def torch_thread_pool() -> tuple[int | None, int | None]:
    """Addresses of torch_parallel_for and torch_get_num_threads in libtorch_cpu; (None, None) where it does not export them."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"))
        functions = (library.torch_parallel_for, library.torch_get_num_threads)
    except (OSError, AttributeError):
        return None, None
    parallel_for, get_num_threads = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    return parallel_for, get_num_threads


def pointer(x: Tensor | None) -> int:
    """Address of the first element; 0 (a null pointer) for None."""
    return 0 if x is None else x.data_ptr()


@functools.cache
def cpu_function(name: str) -> Callable[[ctypes.Structure | bytes], None]:
    """The CPU library's comp_kernels_cpu_{name}, which takes a struct; what it says is wrong is raised."""
    return cpu_function_of(cpu(), name)


def cpu_function_of(library: ctypes.CDLL, name: str) -> Callable[[ctypes.Structure | bytes], None]:
    """The same of a build of the CPU library."""
    return functools.partial(call, _typed(library, f"comp_kernels_cpu_{name}", (ctypes.c_void_p,), ctypes.c_char_p))


FORMATS = {ctypes.c_void_p: "P", ctypes.c_int64: "q", ctypes.c_double: "d"}


def layout(params: type[ctypes.Structure]) -> struct.Struct:
    """Packs all fields of such a struct at once, in half the time that naming them to the constructor takes."""
    return struct.Struct("".join(FORMATS[field[1]] for field in params._fields_))


def cuda_function(name: str, argtypes: tuple, restype: type | None = ctypes.c_char_p) -> Callable:
    """The CUDA library's comp_kernels_cuda_{name} with such arguments."""
    return _typed(cuda(), f"comp_kernels_cuda_{name}", argtypes, restype)


@functools.cache
def _typed(library: ctypes.CDLL, name: str, argtypes: tuple, restype: type | None) -> Callable:
    function = library[name]  # an object of its own: as an attribute it would be shared with whoever types it otherwise
    function.argtypes, function.restype = list(argtypes), restype
    return function


def call(function: Callable, params: ctypes.Structure | bytes, *args) -> None:
    """Call `function(&params, *args)`, which returns null or a message; raises RuntimeError with the message."""
    message = function(params if isinstance(params, bytes) else ctypes.byref(params), *args)
    if message is not None:
        raise RuntimeError(message.decode())
