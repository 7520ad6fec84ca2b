"""rope_attention on NVIDIA GPUs by the kernels of csrc/rope_attention/cuda: 16-bit types and float32, head dims up to 256."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _native
from . import native
from .call import Call

MAX_HEAD_DIM = 256
LSE_DTYPE = torch.float64  # see README.md, Backward
CHANNELS = 8  # head dims are multiples of this


def unavailable_reason(device: torch.device) -> str | None:
    return _native.cuda_unavailable_reason(device)


def declines(call: Call) -> str | None:
    dtype, head_dim = call.q.dtype, call.q.shape[-1]
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"q, k, v must be float16, bfloat16 or float32, got {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, got {head_dim}"
    return None


def unmeasured(call: Call) -> bool:
    """float32 and head dims above 128: executed on the emulator, not yet on a GPU; Triton's kernels for them ran on an H200."""
    return call.q.dtype == torch.float32 or call.q.shape[-1] > 128


def passes(call: Call) -> native.Passes | None:
    """None: q, k and v may have to be copied, or a setting of torch decides."""
    q, k, v = call[:3]
    wide = _wide_rows(q.shape[2], q.element_size(), q.stride(), k.stride(), v.stride())
    return _passes(call) if wide and q.dtype != torch.float32 else None


def _passes(call: Call) -> native.Passes:
    tf32 = call.q.dtype == torch.float32 and tf32_allowed()
    return native.Passes(_launch, LSE_DTYPE, call, alignment=16, tf32=tf32)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    usable = accessible(call)
    out, lse = _passes(usable).forward(*usable[:9])
    return out if usable is call else _narrowed(out, call.q), lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, table_grads: bool
) -> native.Gradients:
    usable = accessible(call)
    if usable is not call:
        out, grad_out = _padded(out), _padded(grad_out)
    found = _passes(usable).backward(*usable[:9], out, lse, _aligned(grad_out), grad_lse, table_grads)
    if usable is call:
        return found
    dq, dk, dv, dcos, dsin, dcos_k, dsin_k = found
    return _narrowed(dq, call.q), _narrowed(dk, call.k), _narrowed(dv, call.v), dcos, dsin, dcos_k, dsin_k


def accessible(call: Call) -> Call:
    """The call with tensors that kernels can read 16 bytes at a time: the same, or copies where a view does not allow it."""
    q, k, v, cos, sin, cos_k, sin_k = call[:7]
    addresses = q.data_ptr() | k.data_ptr() | v.data_ptr()
    if cos is not None:  # contiguous already; a table may still start in the middle of a line
        assert sin is not None and cos_k is not None and sin_k is not None  # all four or none
        addresses |= cos.data_ptr() | sin.data_ptr() | cos_k.data_ptr() | sin_k.data_ptr()
    if addresses % 16 == 0 and _wide_rows(q.shape[2], q.element_size(), q.stride(), k.stride(), v.stride()):
        return call
    q, k, v = (_aligned(_padded(x)) for x in (q, k, v))
    if cos is not None:
        cos, sin, cos_k, sin_k = (x if x is None or x.data_ptr() % 16 == 0 else x.clone() for x in (cos, sin, cos_k, sin_k))
    return Call(q, k, v, cos, sin, cos_k, sin_k, *call[7:])


@functools.lru_cache(maxsize=1024)
def _wide_rows(head_dim: int, element_size: int, *strides: tuple[int, int, int]) -> bool:
    """Whether every row is whole accesses, and begins where one may."""
    chunk = 16 // element_size
    fits = (token % chunk == head % chunk == 0 and channel == 1 for token, head, channel in strides)
    return head_dim % CHANNELS == 0 and all(fits)


def tf32_allowed() -> bool:
    """Whether float32 products may round their factors to TF32: what the user lets torch's own products do on a GPU
    (`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul`). Otherwise three products keep float32's accuracy."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _padded(x: Tensor) -> Tensor:
    """Zeros behind head dims that are not a multiple of 8 (rare: 10, 2): they change no product."""
    missing = -x.shape[-1] % CHANNELS
    return F.pad(x, (0, missing)) if missing else x


def _narrowed(x: Tensor, like: Tensor) -> Tensor:
    """Without what `_padded` added."""
    return x if x.shape == like.shape else x[..., : like.shape[-1]].contiguous()


def _aligned(x: Tensor) -> Tensor:
    """x with a contiguous last dimension and every row at a multiple of 16 bytes: itself, or a copy where a view does not."""
    usable = x.data_ptr() % 16 == 0 and _wide_rows(x.shape[2], x.element_size(), x.stride())
    return x if usable else x.clone(memory_format=torch.contiguous_format)


def _launch(which: str, q: Tensor, params: bytes) -> None:
    """One pass on the current stream of q's device, with the workspace that it needs."""
    size, function = _functions(_native.cuda(), which)
    with _native.on_device(q):  # the size depends on the device too
        workspace = q.new_empty(size(params, which == "backward"), dtype=torch.uint8)
        _native.call(function, params, workspace.data_ptr(), _native.stream(q))


@functools.cache
def _functions(library: ctypes.CDLL, which: str) -> tuple[Callable, Callable]:
    """(what tells the size of a workspace, the pass)."""
    size = _native.cuda_function("rope_attention_workspace", (ctypes.c_void_p, ctypes.c_int32), ctypes.c_int64)
    return size, _native.cuda_function(f"rope_attention_{which}", (ctypes.c_void_p,) * 3)
