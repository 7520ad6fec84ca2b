"""rope_attention on the CPU, by csrc/cpu."""

from __future__ import annotations

import ctypes

import torch

from ... import _native
from . import native

MAX_HEAD_DIM = 256
LSE_DTYPE = torch.float64  # whatever the dtype of q: see csrc/include/comp_kernels/rope_attention.h


def unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu backend needs tensors on the cpu, not on {device}"
    return _native.cpu_unavailable_reason()


def declines(q, k, v, cos, sin, cos_k, sin_k, *, rotary_dim: int, pair_stride: int) -> str | None:
    head_dim = q.shape[-1]
    if head_dim % 2 != 0 or head_dim > MAX_HEAD_DIM:
        return f"head dims must be even and at most {MAX_HEAD_DIM}, got {head_dim}"
    return None


def forward(*args, **kwargs):
    return native.forward(_runner("forward"), LSE_DTYPE, *args, **kwargs)


def backward(*args, **kwargs):
    return native.backward(_runner("backward"), *args, **kwargs)


def _runner(which: str):
    function = getattr(_native.cpu(), f"comp_kernels_cpu_rope_attention_{which}")
    function.argtypes, function.restype = [ctypes.POINTER(native.Params)], ctypes.c_char_p
    return lambda params: _native.call(function, params)
