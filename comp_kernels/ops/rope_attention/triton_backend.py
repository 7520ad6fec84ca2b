"""The Triton backend of rope_attention: says what it can serve, and turns one call into launches."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import torch
from torch import Tensor

from ..._triton import architecture, dot_precision, unavailable_reason  # noqa: F401 (unavailable_reason is part of a backend)
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


@functools.cache
def kernels() -> SimpleNamespace:
    """The modules that import triton; loaded when the first kernel is launched."""
    from . import triton_backward, triton_configs, triton_forward, triton_rotation, triton_tiles

    return SimpleNamespace(
        backward=triton_backward,
        configs=triton_configs,
        forward=triton_forward,
        rotation=triton_rotation,
        tiles=triton_tiles,
    )


@functools.cache
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
    return _head(head_dim, precision, tensors[0].element_size(), *[x.stride()[:2] for x in tensors])


@functools.lru_cache(maxsize=1024)
def _head(head_dim: int, precision: str, element_size: int, *strides: tuple[int, int]):
    align = math.gcd(16 // element_size, head_dim, *(stride for pair in strides for stride in pair))
    return kernels().tiles.Head(head_dim, head_chunks(head_dim, kernels().configs.widest_chunk(head_dim, precision)), align)


def describe_rope(cos: Tensor | None, rotary_dim: int, pair_stride: int):
    if cos is None:
        return kernels().tiles.Rope(num_pairs=0, pair_stride=1, half_table=False, align=1)
    return _rope(cos.shape[-1], cos.element_size(), rotary_dim, pair_stride)


@functools.lru_cache(maxsize=1024)
def _rope(width: int, element_size: int, rotary_dim: int, pair_stride: int):
    align = math.gcd(16 // element_size, width)
    return kernels().tiles.Rope(rotary_dim // 2, pair_stride, half_table=width < rotary_dim, align=align)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    assert call.cu_seqlens is not None  # kernels get bounds
    configs, rotate = kernels().configs, kernels().rotation.rotate
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale = call
    arch, head_dim = architecture(q.device), q.shape[-1]
    precision = dot_precision(arch, q.dtype)
    head = head_k = describe_head(head_dim, precision, q, k, v)
    rope = rope_k = describe_rope(cos, rotary_dim, pair_stride)
    if cos_k is not cos:
        rope_k = describe_rope(cos_k, rotary_dim, pair_stride)
    kernel, tables, tables_k = "forward", (cos, sin), None
    if configs.rotate_keys_inline(q.shape[0], call.cu_seqlens.shape[0] - 1, q.shape[1] // k.shape[1], head_dim):
        kernel, tables_k = "inline", None if cos_k is None else (cos_k, sin_k)
    elif cos_k is not None:
        k = rotate(k, cos_k, sin_k, cu_seqlens_k, head, rope_k)
        head_k = describe_head(k.shape[-1], precision, k)
    if cos is not None and not configs.rotate_queries_inline(head_dim):
        q = rotate(q, cos, sin, cu_seqlens, head, rope)[..., :head_dim]
        tables, rope = (None, None), describe_rope(None, rotary_dim, pair_stride)

    def run(config):
        return kernels().forward.attention_forward(
            q, k, v, tables, tables_k, cu_seqlens, cu_seqlens_k, scale * LOG2E,
            head, head_k, rope, rope_k, precision, config,
        )  # fmt: skip

    return run(configs.choose_config(kernel, arch, head_dim, q.dtype, q.device, run))


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, table_grads: bool
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dcos, dsin, dcos_k, dsin_k); the last four are None without tables or table_grads."""
    configs, rotation, passes = kernels().configs, kernels().rotation, kernels().backward
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale = call
    arch, head_dim = architecture(q.device), q.shape[-1]
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if lse.dtype != LSE_DTYPE:
        lse = lse.to(LSE_DTYPE)  # of another backend, where that one's backward kernels failed
    grad_lse = None if grad_lse is None else grad_lse.to(LSE_DTYPE).contiguous()
    precision = dot_precision(arch, q.dtype)
    head = describe_head(head_dim, precision, q, k, v, grad_out)
    rope = rope_k = describe_rope(cos, rotary_dim, pair_stride)
    if cos_k is not cos:
        rope_k = describe_rope(cos_k, rotary_dim, pair_stride)
    rotated_q, rotated_k, head_qk = q, k, head
    if cos is not None:
        rotated_q = rotation.rotate(q, cos, sin, cu_seqlens, head, rope)
        rotated_k = rotation.rotate(k, cos_k, sin_k, cu_seqlens_k, head, rope_k)
        head_qk = describe_head(rotated_q.shape[-1], precision, rotated_q, rotated_k)
    terms = passes.row_terms(out, grad_out, lse, grad_lse, cu_seqlens, head)
    tensors = (grad_out, rotated_q, rotated_k, v, terms)
    settings = (cu_seqlens, cu_seqlens_k, scale, head, head_qk, precision)
    # AMD's barrier does not wait for stores to global memory, which the epilogue relies on.
    in_epilogue = cos is not None and not table_grads and not arch.startswith("gfx")

    def run_q(config):
        return passes.query_gradient(*tensors, (cos, sin), rope, in_epilogue, *settings, config)

    def run_kv(config):
        return passes.key_value_gradient(*tensors, (cos_k, sin_k), rope_k, in_epilogue, *settings, config)

    dq = run_q(configs.choose_config("query_gradient", arch, head_dim, q.dtype, q.device, run_q))
    dk, dv = run_kv(configs.choose_config("key_value_gradient", arch, head_dim, q.dtype, q.device, run_kv))
    if cos is None or in_epilogue:
        return dq, dk, dv, None, None, None, None
    table_gradients = (
        *rotation.unrotate(dq, q, cos, sin, cu_seqlens, head, rope),
        *rotation.unrotate(dk, k, cos_k, sin_k, cu_seqlens_k, head, rope_k),
    )
    return dq, dk, dv, *(table_gradients if table_grads else (None,) * 4)
