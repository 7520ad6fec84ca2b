"""rope_attention on the CPU, by csrc/rope_attention/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from . import native
from .call import Call

MAX_HEAD_DIM = 256
LSE_DTYPE = torch.float64  # whatever the dtype of q: see csrc/include/comp_kernels/rope_attention.h


def unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu backend needs tensors on the cpu, not on {device}"
    return _native.cpu_unavailable_reason()


def declines(call: Call) -> str | None:
    head_dim = call.q.shape[-1]
    if head_dim % 2 != 0 or head_dim > MAX_HEAD_DIM:
        return f"head dims must be even and at most {MAX_HEAD_DIM}, got {head_dim}"
    return None


def passes(call: Call) -> native.Passes:
    return native.Passes(_run, LSE_DTYPE, call)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    return passes(call).forward(*call[:9])


def backward(call: Call, *arguments) -> native.Gradients:
    return passes(call).backward(*call[:9], *arguments)


def _run(which: str, q: Tensor, params: bytes) -> None:
    _native.cpu_function(f"rope_attention_{which}")(params)
