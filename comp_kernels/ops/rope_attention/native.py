"""rope_attention through the C ABI, CPU or CUDA library alike: allocates the results and fills the params struct."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer
from .call import Call, SeenCall

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""(dq, dk, dv, dcos, dsin, dcos_k, dsin_k); the last four are None without tables, and where they are not wanted."""


RESULTS = ("out", "lse", "grad_out", "grad_lse", "dq", "dk", "dv", "dcos", "dsin", "dcos_k", "dsin_k")


class Params(ctypes.Structure):
    """comp_kernels_rope_attention_params of csrc/include/comp_kernels/rope_attention.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "cos_k", "sin_k", "cu_seqlens", "cu_seqlens_k")),
        *((name, ctypes.c_void_p) for name in RESULTS),
        *((f"{name}_stride_{axis}", ctypes.c_int64) for name in ("q", "k", "v", "grad_out") for axis in ("token", "head")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_tokens_k", "num_sequences", "num_heads", "num_heads_k")),
        *((name, ctypes.c_int64) for name in ("head_dim", "rotary_dim", "pair_stride")),
        *((name, ctypes.c_int64) for name in ("table_width", "table_heads", "table_heads_k")),
        ("scale", ctypes.c_double),
        ("dtype", ctypes.c_int64),
        ("tf32", ctypes.c_int64),
    ]


ADDRESSES, GRAD_OUT_STRIDES = struct.Struct("20P"), struct.Struct("2q")
STRIDES, REST = struct.Struct("6q"), struct.Struct("11qd2q")  # before and behind those of grad_out


def forward(run: Callable[[Params], None], lse_dtype: torch.dtype, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse); `run` computes."""
    q = call.q
    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # new_empty takes twice as long
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)
    run(_params(call, None, (out.data_ptr(), lse.data_ptr(), 0, 0, 0, 0, 0)))
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
) -> Gradients:
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if lse.dtype != lse_dtype:
        lse = lse.to(lse_dtype)  # of another backend, where that one's backward kernels failed
    grad_lse = None if grad_lse is None else grad_lse.to(lse_dtype).contiguous()
    dq = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(call.k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    results = (out.data_ptr(), lse.data_ptr(), grad_out.data_ptr(), pointer(grad_lse))
    params = _params(call, grad_out, (*results, dq.data_ptr(), dk.data_ptr(), dv.data_ptr()))
    if not table_grads:
        run(params)
        return dq, dk, dv, None, None, None, None
    # One gradient per head: the kernels compute heads side by side and add nothing up between them.
    tables, turned = call[3:7], (call.q, call.q, call.k, call.k)
    per_head = [None if t is None else t.new_empty((*x.shape[:2], t.shape[-1])) for t, x in zip(tables, turned)]
    params.dcos, params.dsin, params.dcos_k, params.dsin_k = (pointer(gradient) for gradient in per_head)
    run(params)
    dcos, dsin, dcos_k, dsin_k = (
        g if g is None or table is None or table.dim() == 3 else g.sum(1) for g, table in zip(per_head, tables)
    )
    return dq, dk, dv, dcos, dsin, dcos_k, dsin_k


def _params(call: Call, grad_out: Tensor | None, results: tuple[int, ...]) -> Params:
    """The struct of a pass; results: addresses from `out` to `dv`. Those of the tables' gradients are null. The tensors must
    outlive it.

    Packed: naming all fields to the constructor takes twice as long. What stands behind the addresses is packed once for all
    calls that look alike.
    """
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale = call
    assert cu_seqlens is not None and cu_seqlens_k is not None  # kernels get bounds
    seen = call.seen if isinstance(call, SeenCall) else None
    if seen is not None and "packed" in seen:
        strides, rest = seen["packed"]
    else:
        strides = STRIDES.pack(*(stride for x in (q, k, v) for stride in x.stride()[:2]))
        rest = REST.pack(
            *(q.shape[0], k.shape[0], cu_seqlens.shape[0] - 1, q.shape[1], k.shape[1]),
            *(q.shape[2], rotary_dim, pair_stride),
            0 if cos is None else cos.shape[-1],
            *(x.shape[1] if table is not None and table.dim() == 3 else 1 for table, x in ((cos, q), (cos_k, k))),
            scale,
            _native.DTYPE_CODES[q.dtype],
            0,  # tf32: the cuda backend decides
        )
        if seen is not None:
            seen["packed"] = strides, rest
    addresses = ADDRESSES.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(cos), pointer(sin), pointer(cos_k), pointer(sin_k),
        cu_seqlens.data_ptr(), cu_seqlens_k.data_ptr(), *results, 0, 0, 0, 0,
    )  # fmt: skip
    grad_out_strides = (0, 0) if grad_out is None else grad_out.stride()[:2]
    return Params.from_buffer_copy(addresses + strides + GRAD_OUT_STRIDES.pack(*grad_out_strides) + rest)
