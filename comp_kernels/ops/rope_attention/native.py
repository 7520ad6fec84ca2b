"""rope_attention through the C ABI, CPU or CUDA library alike: allocates the results and fills the params struct."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer


class Params(ctypes.Structure):
    """comp_kernels_rope_attention_params of csrc/include/comp_kernels/rope_attention.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "cos_k", "sin_k", "cu_seqlens", "cu_seqlens_k")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "grad_out", "grad_lse")),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv", "dcos", "dsin", "dcos_k", "dsin_k")),
        *((f"{name}_stride_{axis}", ctypes.c_int64) for name in ("q", "k", "v", "grad_out") for axis in ("token", "head")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_tokens_k", "num_sequences", "num_heads", "num_heads_k")),
        *((name, ctypes.c_int64) for name in ("head_dim", "rotary_dim", "pair_stride")),
        *((name, ctypes.c_int64) for name in ("table_width", "table_heads", "table_heads_k")),
        ("scale", ctypes.c_double),
        ("dtype", ctypes.c_int64),
    ]


def forward(
    run: Callable[[Params], None],
    lse_dtype: torch.dtype,
    q,
    k,
    v,
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
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes as in comp_kernels.rope_attention, tables and bounds filled in; `run` computes. Returns (out, lse)."""
    out = _contiguous_like(q)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)
    params = _params(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale)
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    run(params)
    return out, lse


def backward(
    run: Callable[[Params], None],
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
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv = _contiguous_like(q), _contiguous_like(k), _contiguous_like(v)
    # One gradient per head: the kernels compute heads side by side and add nothing up between them.
    per_head = {
        name: table.new_empty((*x.shape[:2], table.shape[-1]))
        for name, table, x in (("dcos", cos, q), ("dsin", sin, q), ("dcos_k", cos_k, k), ("dsin_k", sin_k, k))
        if table_grads and table is not None
    }
    params = _params(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale)
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    params.grad_out, params.grad_lse = grad_out.data_ptr(), pointer(grad_lse)
    params.grad_out_stride_token, params.grad_out_stride_head, _ = grad_out.stride()
    params.dq, params.dk, params.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    for name, gradient in per_head.items():
        setattr(params, name, gradient.data_ptr())
    run(params)
    if not per_head:
        return dq, dk, dv, None, None, None, None

    def table_gradient(name: str, table: Tensor | None) -> Tensor | None:
        gradient = per_head.get(name)
        return gradient if gradient is None or table.dim() == 3 else gradient.sum(1)

    tables = (("dcos", cos), ("dsin", sin), ("dcos_k", cos_k), ("dsin_k", sin_k))
    return dq, dk, dv, *(table_gradient(name, table) for name, table in tables)


def _contiguous_like(x: Tensor) -> Tensor:
    """Uninitialised; new_empty takes twice as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _params(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale) -> Params:
    """The inputs that both passes share. The tensors must outlive the call."""
    num_tokens, num_heads, head_dim = q.shape
    num_tokens_k, num_heads_k, _ = k.shape
    if cos_k is not None and cos_k is not cos and (cos is None or cos_k.shape[-1] != cos.shape[-1]):
        widths = [None if table is None else table.shape[-1] for table in (cos, cos_k)]
        raise ValueError(f"cos and cos_k must have the same width, got {widths}")
    q_stride_token, q_stride_head, _ = q.stride()
    k_stride_token, k_stride_head, _ = k.stride()
    v_stride_token, v_stride_head, _ = v.stride()
    return Params(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        cos=pointer(cos),
        sin=pointer(sin),
        cos_k=pointer(cos_k),
        sin_k=pointer(sin_k),
        cu_seqlens=cu_seqlens.data_ptr(),
        cu_seqlens_k=cu_seqlens_k.data_ptr(),
        q_stride_token=q_stride_token,
        q_stride_head=q_stride_head,
        k_stride_token=k_stride_token,
        k_stride_head=k_stride_head,
        v_stride_token=v_stride_token,
        v_stride_head=v_stride_head,
        num_tokens=num_tokens,
        num_tokens_k=num_tokens_k,
        num_sequences=cu_seqlens.shape[0] - 1,
        num_heads=num_heads,
        num_heads_k=num_heads_k,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        pair_stride=pair_stride,
        table_width=0 if cos is None else cos.shape[-1],
        table_heads=1 if cos is None or cos.dim() == 2 else cos.shape[1],
        table_heads_k=1 if cos_k is None or cos_k.dim() == 2 else cos_k.shape[1],
        scale=scale,
        dtype=_native.DTYPE_CODES[q.dtype],
    )
