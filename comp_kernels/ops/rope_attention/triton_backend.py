"""The Triton backend of rope_attention: says what it can serve, and turns one call into launches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._triton import architecture, unavailable_reason  # noqa: F401 (unavailable_reason is part of a backend)
from ..._units import LOG2E
from .call import Call

MAX_HEAD_DIM = 256
LSE_DTYPE = torch.float64  # see README.md, Backward


def declines(call: Call) -> str | None:
    q = call.q
    if q.dtype == torch.float64:
        return "the Triton kernels compute in float32, q is float64"
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and architecture(q.device) == "interpreter":
        return "Triton's interpreter cannot multiply bfloat16 matrices"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dims must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}"
    return None


def head_chunks(head_dim: int, widest: int) -> tuple[tuple[int, int], ...]:
    """head_dim rounded up to a multiple of 16, as (first channel, power of two) pieces: 72 -> ((0, 64), (64, 16))."""
    chunks, first, rest = [], 0, -(-head_dim // 16) * 16
    while rest:
        width = min(1 << (rest.bit_length() - 1), widest)
        chunks.append((first, width))
        first, rest = first + width, rest - width
    return tuple(chunks)


def describe_head(head_dim: int, precision: str, *tensors: Tensor):
    """The `Head` of tensors [T, H, head_dim], or wider ones with padding."""
    from .triton_configs import widest_chunk
    from .triton_tiles import Head

    strides = [stride for x in tensors for stride in x.stride()[:2]]
    align = math.gcd(16 // tensors[0].element_size(), head_dim, *strides)
    return Head(head_dim, head_chunks(head_dim, widest_chunk(head_dim, precision)), align)


def describe_rope(cos: Tensor | None, rotary_dim: int, pair_stride: int):
    from .triton_tiles import Rope

    if cos is None:
        return Rope(num_pairs=0, pair_stride=1, half_table=False, align=1)
    width = cos.shape[-1]
    return Rope(rotary_dim // 2, pair_stride, half_table=width < rotary_dim, align=math.gcd(16 // cos.element_size(), width))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call `for_kernels`."""
    from .triton_configs import choose_config, dot_precision, rotate_keys_inline, rotate_queries_inline
    from .triton_forward import attention_forward
    from .triton_rotation import rotate

    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale = call
    arch, head_dim = architecture(q.device), q.shape[-1]
    precision = dot_precision(arch, q.dtype)
    head = head_k = describe_head(head_dim, precision, q, k, v)
    rope, rope_k = (describe_rope(table, rotary_dim, pair_stride) for table in (cos, cos_k))
    kernel, tables, tables_k = "forward", (cos, sin), None
    if rotate_keys_inline(q.shape[0], cu_seqlens.shape[0] - 1, q.shape[1] // k.shape[1], head_dim):
        kernel, tables_k = "inline", None if cos_k is None else (cos_k, sin_k)
    elif cos_k is not None:
        k = rotate(k, cos_k, sin_k, cu_seqlens_k, head, rope_k)
        head_k = describe_head(k.shape[-1], precision, k)
    if cos is not None and not rotate_queries_inline(head_dim):
        q = rotate(q, cos, sin, cu_seqlens, head, rope)[..., :head_dim]
        tables, rope = (None, None), describe_rope(None, rotary_dim, pair_stride)

    def run(config):
        return attention_forward(
            q, k, v, tables, tables_k, cu_seqlens, cu_seqlens_k, scale * LOG2E,
            head, head_k, rope, rope_k, precision, config,
        )  # fmt: skip

    return run(choose_config(kernel, arch, head_dim, q.dtype, q.device, run))


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, table_grads: bool
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dcos, dsin, dcos_k, dsin_k); the last four are None without tables or table_grads."""
    from .triton_backward import key_value_gradient, query_gradient, row_terms
    from .triton_configs import choose_config, dot_precision
    from .triton_rotation import rotate, unrotate

    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale = call
    arch, head_dim = architecture(q.device), q.shape[-1]
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    lse = lse.to(LSE_DTYPE)  # of another backend, where that one's backward kernels failed
    grad_lse = None if grad_lse is None else grad_lse.to(LSE_DTYPE).contiguous()
    precision = dot_precision(arch, q.dtype)
    head = describe_head(head_dim, precision, q, k, v, grad_out)
    rope, rope_k = (describe_rope(table, rotary_dim, pair_stride) for table in (cos, cos_k))
    rotated_q, rotated_k, head_qk = q, k, head
    if cos is not None:
        rotated_q = rotate(q, cos, sin, cu_seqlens, head, rope)
        rotated_k = rotate(k, cos_k, sin_k, cu_seqlens_k, head, rope_k)
        head_qk = describe_head(rotated_q.shape[-1], precision, rotated_q, rotated_k)
    terms = row_terms(out, grad_out, lse, grad_lse, cu_seqlens, head)
    tensors = (grad_out, rotated_q, rotated_k, v, terms)
    settings = (cu_seqlens, cu_seqlens_k, scale, head, head_qk, precision)
    # AMD's barrier does not wait for stores to global memory, which the epilogue relies on.
    in_epilogue = cos is not None and not table_grads and not arch.startswith("gfx")

    def run_q(config):
        return query_gradient(*tensors, (cos, sin), rope, in_epilogue, *settings, config)

    def run_kv(config):
        return key_value_gradient(*tensors, (cos_k, sin_k), rope_k, in_epilogue, *settings, config)

    dq = run_q(choose_config("query_gradient", arch, head_dim, q.dtype, q.device, run_q))
    dk, dv = run_kv(choose_config("key_value_gradient", arch, head_dim, q.dtype, q.device, run_kv))
    if cos is None or in_epilogue:
        return dq, dk, dv, None, None, None, None
    table_gradients = (
        *unrotate(dq, q, cos, sin, cu_seqlens, head, rope),
        *unrotate(dk, k, cos_k, sin_k, cu_seqlens_k, head, rope_k),
    )
    return dq, dk, dv, *(table_gradients if table_grads else (None,) * 4)
