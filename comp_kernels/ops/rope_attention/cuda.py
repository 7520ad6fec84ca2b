"""rope_attention on NVIDIA GPUs by the hand-written kernels of csrc/cuda: float16 and bfloat16, head dims up to 128."""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _native
from . import native
from .call import Call

MAX_HEAD_DIM = 128
LSE_DTYPE = torch.float32
CHANNELS = 8  # of 16 bits in one 16-byte access


def unavailable_reason(device: torch.device) -> str | None:
    return _native.cuda_unavailable_reason(device)


def declines(call: Call) -> str | None:
    dtype, head_dim = call.q.dtype, call.q.shape[-1]
    if dtype not in (torch.float16, torch.bfloat16):
        return f"q, k, v must be float16 or bfloat16, got {dtype}: float32 would need tf32 products, which are not built"
    if head_dim > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, got {head_dim}"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    out, lse = native.forward(accessible(call), functools.partial(_launch, "forward", call.q), LSE_DTYPE)
    return _narrowed(out, call.q), lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, table_grads: bool
) -> tuple[Tensor | None, ...]:
    run = functools.partial(_launch, "backward", call.q)
    out, grad_out = _padded(out), _aligned(_padded(grad_out))
    dq, dk, dv, *of_tables = native.backward(
        accessible(call), out, lse, grad_out, grad_lse, table_grads, run, LSE_DTYPE
    )  # fmt: skip
    return _narrowed(dq, call.q), _narrowed(dk, call.k), _narrowed(dv, call.v), *of_tables


def accessible(call: Call) -> Call:
    """The call with tensors that kernels can read 16 bytes at a time: the same, or copies where a view does not allow it."""
    q, k, v = (_aligned(_padded(x)) for x in call[:3])
    # Tables are contiguous already; one may still start in the middle of a line.
    tables = (table.clone() if table is not None and table.data_ptr() % 16 else table for table in call[3:7])
    return Call(q, k, v, *tables, *call[7:])


def _padded(x: Tensor) -> Tensor:
    """Zeros behind head dims that are not a multiple of 8 (rare: 10, 2): they change no product."""
    missing = -x.shape[-1] % CHANNELS
    return F.pad(x, (0, missing)) if missing else x


def _narrowed(x: Tensor, like: Tensor) -> Tensor:
    """Without what `_padded` added."""
    return x if x.shape == like.shape else x[..., : like.shape[-1]].contiguous()


def _aligned(x: Tensor) -> Tensor:
    """x with a contiguous last dimension and every row at a multiple of 16 bytes: itself, or a copy where a view does not."""
    *strides, channel = x.stride()
    rows = channel == 1 and all(stride % CHANNELS == 0 for stride in strides)
    return x if rows and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _launch(which: str, q: Tensor, params: native.Params) -> None:
    """One pass on the current stream of q's device, with the workspace that it needs."""
    size = _native.cuda_function("rope_attention_workspace", (ctypes.POINTER(native.Params), ctypes.c_int32), ctypes.c_int64)
    function = _native.cuda_function(
        f"rope_attention_{which}", (ctypes.POINTER(native.Params), ctypes.c_void_p, ctypes.c_void_p)
    )
    with torch.cuda.device_of(q):  # the size depends on the device too
        workspace = q.new_empty(size(ctypes.byref(params), which == "backward"), dtype=torch.uint8)
        _native.call(function, params, workspace.data_ptr(), _native.stream(q.device))
