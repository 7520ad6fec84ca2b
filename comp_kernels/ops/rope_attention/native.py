"""rope_attention through the C ABI, CPU or CUDA library alike: allocates the results and fills the params struct."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer
from .call import Call


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


def forward(run: Callable[[Params], None], lse_dtype: torch.dtype, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse); `run` computes."""
    out = torch.empty_like(call.q, memory_format=torch.contiguous_format)  # new_empty takes twice as long
    lse = call.q.new_empty((call.q.shape[1], call.q.shape[0]), dtype=lse_dtype)
    params = _params(call)
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    run(params)
    return out, lse


def backward(
    run: Callable[[Params], None],
    lse_dtype: torch.dtype,
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    table_grads: bool,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dcos, dsin, dcos_k, dsin_k); the last four are None without tables or table_grads."""
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    lse = lse.to(lse_dtype)  # of another backend, where that one's backward kernels failed
    grad_lse = None if grad_lse is None else grad_lse.to(lse_dtype).contiguous()
    dq = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(call.k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    params = _params(call)
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    params.grad_out, params.grad_lse = grad_out.data_ptr(), pointer(grad_lse)
    params.grad_out_stride_token, params.grad_out_stride_head, _ = grad_out.stride()
    params.dq, params.dk, params.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    if not table_grads:
        run(params)
        return dq, dk, dv, None, None, None, None
    # One gradient per head: the kernels compute heads side by side and add nothing up between them.
    tables, turned = call[3:7], (call.q, call.q, call.k, call.k)
    per_head = [None if t is None else t.new_empty((*x.shape[:2], t.shape[-1])) for t, x in zip(tables, turned)]
    params.dcos, params.dsin, params.dcos_k, params.dsin_k = (pointer(gradient) for gradient in per_head)
    run(params)
    return dq, dk, dv, *(g if g is None or table.dim() == 3 else g.sum(1) for g, table in zip(per_head, tables))


def _params(call: Call) -> Params:
    """The inputs that both passes share. The tensors must outlive the call."""
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale = call
    num_tokens, num_heads, head_dim = q.shape
    num_tokens_k, num_heads_k, _ = k.shape
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
