"""rope_attention through the C ABI, CPU or CUDA library alike: allocates the results and fills the params struct."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer
from .call import Call

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


# Addresses of the inputs and of `out`, `lse`; those that are the backward pass's alone; those of the tables' gradients.
ADDRESSES, OF_BACKWARD, OF_TABLES = struct.Struct("11P"), struct.Struct("5P"), struct.Struct("4P")
GRAD_OUT_STRIDES = struct.Struct("2q")
STRIDES, REST = struct.Struct("6q"), struct.Struct("11qd2q")  # before and behind those of grad_out
NO_TABLES = OF_TABLES.pack(0, 0, 0, 0)
FORWARD_ALONE = OF_BACKWARD.pack(0, 0, 0, 0, 0) + NO_TABLES
NO_STRIDES = GRAD_OUT_STRIDES.pack(0, 0)


class Misaligned(Exception):
    """An address is not what kernels need; nothing has run."""


class Passes:
    """Both passes of calls that look alike: the struct is packed once but for addresses, and what grad_out alone decides.

    run("forward" or "backward", q, struct) computes. alignment, in bytes: of tensors and of the rows of grad_out. The tensors
    of a call come in the order of its fields; those of keys may be None where they are the queries'.
    """

    def __init__(
        self,
        run: Callable[[str, Tensor, bytes], None],
        lse_dtype: torch.dtype,
        call: Call,
        alignment: int = 1,
        tf32: bool = False,
    ) -> None:
        q, k, v, cos, _, cos_k, _, cu_seqlens, _, rotary_dim, pair_stride, scale = call
        assert cu_seqlens is not None  # kernels get bounds
        self.run, self.lse_dtype, self.lse_shape = run, lse_dtype, (q.shape[1], q.shape[0])
        self.misaligned, self.element_size = alignment - 1, q.element_size()
        self.strides = STRIDES.pack(*(stride for x in (q, k, v) for stride in x.stride()[:2]))
        self.rest = REST.pack(
            *(q.shape[0], k.shape[0], cu_seqlens.shape[0] - 1, q.shape[1], k.shape[1]),
            *(q.shape[2], rotary_dim, pair_stride),
            0 if cos is None else cos.shape[-1],
            *(x.shape[1] if table is not None and table.dim() == 3 else 1 for table, x in ((cos, q), (cos_k, k))),
            scale,
            _native.DTYPE_CODES[q.dtype],
            tf32,
        )
        self.forward_rest = FORWARD_ALONE + self.strides + NO_STRIDES + self.rest

    def forward(self, q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        inputs = self._addresses(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(*self.lse_shape, dtype=self.lse_dtype)
        self.run("forward", q, ADDRESSES.pack(*inputs, out.data_ptr(), lse.data_ptr()) + self.forward_rest)
        return out, lse

    def backward(
        self, q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, out, lse, grad_out, grad_lse, table_grads
    ) -> Gradients:
        inputs = self._addresses(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k)
        token_stride, head_stride, channel_stride = grad_out.stride()
        if channel_stride != 1:
            grad_out = grad_out.contiguous()
            token_stride, head_stride, _ = grad_out.stride()
        address = grad_out.data_ptr()
        if (address | (token_stride | head_stride) * self.element_size) & self.misaligned:
            raise Misaligned
        if lse.dtype != self.lse_dtype:
            lse = lse.to(self.lse_dtype)  # of another backend, where that one's backward kernels failed
        if grad_lse is not None:
            grad_lse = grad_lse.to(self.lse_dtype).contiguous()
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.empty_like(k, memory_format=torch.contiguous_format)
        dv = torch.empty_like(v, memory_format=torch.contiguous_format)
        addresses = ADDRESSES.pack(*inputs, out.data_ptr(), lse.data_ptr())
        addresses += OF_BACKWARD.pack(address, pointer(grad_lse), dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
        rest = self.strides + GRAD_OUT_STRIDES.pack(token_stride, head_stride) + self.rest
        if not table_grads:
            self.run("backward", q, addresses + NO_TABLES + rest)
            return dq, dk, dv, None, None, None, None
        # One gradient per head: the kernels compute heads side by side and add nothing up between them.
        tables, turned = (cos, sin, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k), (q, q, k, k)
        per_head = [None if t is None else t.new_empty((*x.shape[:2], t.shape[-1])) for t, x in zip(tables, turned)]
        self.run("backward", q, addresses + OF_TABLES.pack(*(pointer(x) for x in per_head)) + rest)
        dcos, dsin, dcos_k, dsin_k = (
            g if g is None or table is None or table.dim() == 3 else g.sum(1) for g, table in zip(per_head, tables)
        )
        return dq, dk, dv, dcos, dsin, dcos_k, dsin_k

    def _addresses(self, q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k) -> tuple[int, ...]:
        """Those of the inputs, in the order of the struct."""
        of_q, of_k, of_v, bounds = q.data_ptr(), k.data_ptr(), v.data_ptr(), cu_seqlens.data_ptr()
        of_cos = of_sin = of_cos_k = of_sin_k = 0
        if cos is not None:
            of_cos, of_sin = of_cos_k, of_sin_k = cos.data_ptr(), sin.data_ptr()
            if cos_k is not None:
                of_cos_k, of_sin_k = cos_k.data_ptr(), sin_k.data_ptr()
        if (of_q | of_k | of_v | of_cos | of_sin | of_cos_k | of_sin_k) & self.misaligned:
            raise Misaligned
        bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.data_ptr()
        return of_q, of_k, of_v, of_cos, of_sin, of_cos_k, of_sin_k, bounds, bounds_k
