"""rope_attention on NVIDIA GPUs by the kernels of csrc/rope_attention/cuda: float16 and bfloat16, head dims up to 128."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _native
from . import native

MAX_HEAD_DIM = 128
CHANNELS = 8  # of 16 bits in one 16-byte access


def unavailable_reason(device: torch.device) -> str | None:
    return _native.cuda_unavailable_reason(device)


def declines(q, k, v, cos, sin, cos_k, sin_k, *, rotary_dim: int, pair_stride: int) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q, k, v must be float16 or bfloat16, got {q.dtype}: float32 would need tf32 products, which are not built"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}"
    return None


def forward(
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, *, rotary_dim: int, pair_stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes as in comp_kernels.rope_attention, tables and bounds filled in; returns (out, lse)."""
    head_dim = q.shape[-1]
    q, k, v, cos, sin, cos_k, sin_k = _accessible(q, k, v, cos, sin, cos_k, sin_k)
    out, lse = native.forward(
        _runner("forward", q),
        torch.float32,
        q,
        k,
        v,
        cos,
        sin,
        cos_k,
        sin_k,
        cu_seqlens,
        cu_seqlens_k,
        rotary_dim=rotary_dim,
        pair_stride=pair_stride,
        scale=scale,
    )
    return out[..., :head_dim].contiguous(), lse


def backward(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    cos,
    sin,
    cos_k,
    sin_k,
    cu_seqlens,
    cu_seqlens_k,
    *,
    rotary_dim: int,
    pair_stride: int,
    scale: float,
    table_grads: bool,
) -> tuple[Tensor | None, ...]:
    """Returns (dq, dk, dv, dcos, dsin, dcos_k, dsin_k); the last four are None without tables or table_grads."""
    head_dim = q.shape[-1]
    q, k, v, cos, sin, cos_k, sin_k = _accessible(q, k, v, cos, sin, cos_k, sin_k)
    dq, dk, dv, *of_tables = native.backward(
        _runner("backward", q),
        _aligned(_padded(grad_out)),
        grad_lse,
        q,
        k,
        v,
        _padded(out),
        lse,
        cos,
        sin,
        cos_k,
        sin_k,
        cu_seqlens,
        cu_seqlens_k,
        rotary_dim=rotary_dim,
        pair_stride=pair_stride,
        scale=scale,
        table_grads=table_grads,
    )
    return *(gradient[..., :head_dim].contiguous() for gradient in (dq, dk, dv)), *of_tables


def _padded(x: Tensor) -> Tensor:
    """Zeros behind head dims that are not a multiple of 8 (rare: 10, 2): they change no product."""
    missing = -x.shape[-1] % CHANNELS
    return F.pad(x, (0, missing)) if missing else x


def _aligned(x: Tensor) -> Tensor:
    """x with a contiguous last dimension and every row at a multiple of 16 bytes: itself, or a copy where a view does not."""
    unit = 16 // x.element_size()
    rows = x.stride(-1) == 1 and all(stride % unit == 0 for stride in x.stride()[:-1])
    return x if rows and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _accessible(q, k, v, *tables: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inputs as the kernels can read them. Tables are contiguous already; one may still start in the middle of a line."""
    tables = (table.clone() if table is not None and table.data_ptr() % 16 else table for table in tables)
    return *(_aligned(_padded(x)) for x in (q, k, v)), *tables


def _runner(which: str, q: Tensor):
    """run(params) for `native`: launches on the current stream of q's device, with the workspace that the call needs."""
    library = _native.cuda()
    size = library.comp_kernels_cuda_rope_attention_workspace
    size.argtypes, size.restype = [ctypes.POINTER(native.Params), ctypes.c_int32], ctypes.c_int64
    function = getattr(library, f"comp_kernels_cuda_rope_attention_{which}")
    function.argtypes = [ctypes.POINTER(native.Params), ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_char_p

    def run(params: native.Params) -> None:
        with torch.cuda.device_of(q):  # the size depends on the device too
            workspace = q.new_empty(size(ctypes.byref(params), which == "backward"), dtype=torch.uint8)
            _native.call(function, params, workspace.data_ptr(), _native.stream(q.device))

    return run
