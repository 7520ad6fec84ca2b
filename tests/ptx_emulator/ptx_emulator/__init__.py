"""Run compiled NVIDIA PTX on the CPU: execute, check and count what a kernel really does."""

from .api import Kernel, KernelError, Module, compile_cuda, load
from .parser import PtxError
from .report import CHIPS, Report
from .tensormap import TensorMap
from .triton_support import triton_compile, triton_launch

__all__ = [
    "Kernel",
    "KernelError",
    "Module",
    "compile_cuda",
    "load",
    "PtxError",
    "CHIPS",
    "Report",
    "TensorMap",
    "triton_compile",
    "triton_launch",
]
