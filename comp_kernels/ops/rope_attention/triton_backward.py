"""Backward kernels of rope_attention: one per query tile for dq, one per key tile for dk and dv. No atomics, so every sum has
a fixed order and the gradients are bit-equal from run to run.

Both read rotated q and k, rounded exactly as in the forward pass, and recompute the weights from the saved lse. It is float64
and reaches them in base 2 as the sum of two float32 numbers, `high + low`. dq and dk leave through the transposed rotation,
applied in place to the tile just written (a cache hit), because a channel and its partner may sit in different registers,
threads and chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import cdiv, launch, next_power_of_2
from ..._units import LOG2E
from .triton_configs import TileConfig
from .triton_rotation import head_stride, token_stride, unrotate_in_place
from .triton_tiles import (
    VARYING,
    Head,
    Rope,
    add_dot_rows,
    dot_channels,
    find_tile,
    load_both_ways,
    load_tile,
    offset,
    scale_tile,
    sequence_bounds,
    store_tile,
    transpose_tile,
    zero_tile,
)

LOG2_E: tl.constexpr = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=VARYING)
def row_terms_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, terms_ptr, cu_seqlens_ptr, num_sequences, num_tokens, num_rows_of_all_heads,
    grad_stride_h, OUT_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """terms [3, Hq, T], what a row of weights and of their gradient has in common: delta, and lse in base 2 as high + low.

    delta = sum over channels of out * grad_out, minus grad_lse.
    """
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    num_rows = tl.load(cu_seqlens_ptr + num_sequences) - first
    if num_rows <= 0:
        return
    rows = tl.arange(0, BLOCK)
    out = out_ptr + offset(first, OUT_STRIDE, HEAD.align) + head * HEAD.dim
    grad = grad_out_ptr + offset(first, GRAD_STRIDE, HEAD.align) + offset(head, grad_stride_h, HEAD.align)
    out_tile = load_tile(out, rows, num_rows, OUT_STRIDE, True, HEAD)
    grad_tile = load_tile(grad, rows, num_rows, GRAD_STRIDE, True, HEAD)
    delta = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(len(HEAD.chunks)):
        delta += tl.sum(out_tile[c].to(tl.float32) * grad_tile[c].to(tl.float32), 1)
    row = head.to(tl.int64) * num_tokens + first
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + row + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + row + rows, mask=rows < num_rows, other=0.0) * tl.full((BLOCK,), LOG2_E, tl.float64)
    high = lse.to(tl.float32)
    # Beyond 2^45 changes of base have cost lse the logarithm of the sum: the key with the largest score then has all weight.
    low = tl.where(tl.abs(lse) < 35184372088832.0, lse - high, 0.0).to(tl.float32)
    for_delta = terms_ptr + row + rows
    for_high = for_delta + num_rows_of_all_heads
    tl.store(for_delta, delta, mask=rows < num_rows)
    tl.store(for_high, high, mask=rows < num_rows)
    tl.store(for_high + num_rows_of_all_heads, low, mask=rows < num_rows)


@triton.jit
def load_row_terms(terms, num_rows_of_all_heads, rows, num_rows, CHECK_ROWS: tl.constexpr):
    """(delta, high, low) of `rows`; weights are zero (high is infinite) for those from num_rows on."""
    for_high = terms + num_rows_of_all_heads
    for_low = for_high + num_rows_of_all_heads
    if CHECK_ROWS:
        keep = rows < num_rows
        delta = tl.load(terms + rows, mask=keep, other=0.0)
        high = tl.load(for_high + rows, mask=keep, other=float("inf"))
        low = tl.load(for_low + rows, mask=keep, other=0.0)
    else:
        delta = tl.load(terms + rows)
        high = tl.load(for_high + rows)
        low = tl.load(for_low + rows)
    return delta, high, low


@triton.jit
def weights_of(exponents):
    """Softmax weights. Above 1 they would be only by what rounding leaves of huge logits; NaN stays NaN."""
    return tl.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def add_query_tile(
    grad_key, grad_value, key, value, q, grad_out, terms, num_rows_of_all_heads, first, num_rows, scale_log2,
    Q_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr, FOR_KEY: tl.constexpr, FOR_VALUE: tl.constexpr,
    LAST: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_QK: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of one key tile what the BLOCK_M queries from `first` on contribute."""
    rows = tl.arange(0, BLOCK_M)
    q += offset(first, Q_STRIDE, HEAD_QK.align)
    query, query_t = load_both_ways(q, rows, num_rows - first, Q_STRIDE, LAST, HEAD_QK, PRECISION)
    delta, high, low = load_row_terms(terms + first, num_rows_of_all_heads, rows, num_rows - first, LAST)
    scores = dot_channels(key, query_t, HEAD, PRECISION)  # [BLOCK_N, BLOCK_M]: transposed
    weights = weights_of(scores * scale_log2 - high[None, :] - low[None, :])
    grad_out += offset(first, GRAD_STRIDE, HEAD.align)
    cotangent, cotangent_t = load_both_ways(grad_out, rows, num_rows - first, GRAD_STRIDE, LAST, HEAD, PRECISION)
    if FOR_VALUE:
        grad_value = add_dot_rows(grad_value, weights.to(cotangent[0].dtype), cotangent, HEAD, PRECISION)
    if FOR_KEY:
        grad_scores = weights * (dot_channels(value, cotangent_t, HEAD, PRECISION) - delta[None, :])
        grad_key = add_dot_rows(grad_key, grad_scores.to(query[0].dtype), query, HEAD, PRECISION)
    return grad_key, grad_value


@triton.jit
def sum_over_queries(
    key, value, q_ptr, grad_out_ptr, terms_ptr, num_rows_of_all_heads, begin, num_queries, num_tokens, head_k, scale_log2,
    q_stride_h, grad_stride_h, Q_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    FOR_KEY: tl.constexpr, FOR_VALUE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_QK: tl.constexpr,
):  # fmt: skip
    """(grad_key, grad_value) of one key tile, before scale and rotation; zeros for the one not asked for."""
    grad_key = zero_tile(key[0].shape[0], HEAD)
    grad_value = zero_tile(key[0].shape[0], HEAD)
    CHECK: tl.constexpr = PRECISION == "tf32x3"  # in every tile: there are no registers for a second, unchecked body
    whole = num_queries if CHECK else num_queries // BLOCK_M * BLOCK_M
    for head in range(head_k * GROUP, head_k * GROUP + GROUP):
        q = q_ptr + offset(begin, Q_STRIDE, HEAD_QK.align) + offset(head, q_stride_h, HEAD_QK.align)
        grad_out = grad_out_ptr + offset(begin, GRAD_STRIDE, HEAD.align) + offset(head, grad_stride_h, HEAD.align)
        terms = terms_ptr + offset(head, num_tokens, 1) + begin
        for first in range(0, whole, BLOCK_M):
            grad_key, grad_value = add_query_tile(
                grad_key, grad_value, key, value, q, grad_out, terms, num_rows_of_all_heads, first, num_queries, scale_log2,
                Q_STRIDE, GRAD_STRIDE, FOR_KEY, FOR_VALUE, CHECK, BLOCK_M, PRECISION, HEAD, HEAD_QK,
            )  # fmt: skip
        if whole < num_queries:
            grad_key, grad_value = add_query_tile(
                grad_key, grad_value, key, value, q, grad_out, terms, num_rows_of_all_heads, whole, num_queries, scale_log2,
                Q_STRIDE, GRAD_STRIDE, FOR_KEY, FOR_VALUE, True, BLOCK_M, PRECISION, HEAD, HEAD_QK,
            )  # fmt: skip
    return grad_key, grad_value


@triton.jit(do_not_specialize=VARYING)
def key_value_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, terms_ptr, cos_k_ptr, sin_k_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr,
    grad_k_ptr, grad_v_ptr, num_sequences, num_tokens, num_tokens_k, num_rows_of_all_heads, scale, scale_log2,
    q_stride_h, k_stride_h, v_stride_h, grad_stride_h, table_stride_h,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    GRAD_K_STRIDE: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, PASSES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr,
    UNROTATE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD: tl.constexpr, HEAD_QK: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v [Tk, Hkv, D] contiguous. Grid: (slots of key tiles, Hkv); loops over the GROUP query heads of the head."""
    sequence, begin, first, length = find_tile(cu_seqlens_k_ptr, num_sequences, num_tokens_k, tl.program_id(0), BLOCK_N)
    if first >= length:
        return
    begin_q, num_queries = sequence_bounds(cu_seqlens_ptr, num_sequences, sequence)
    head_k = tl.program_id(1)
    num_keys = length - first
    first += begin
    columns = tl.arange(0, BLOCK_N)

    k = k_ptr + offset(first, K_STRIDE, HEAD_QK.align) + offset(head_k, k_stride_h, HEAD_QK.align)
    v = v_ptr + offset(first, V_STRIDE, HEAD.align) + offset(head_k, v_stride_h, HEAD.align)
    key = load_tile(k, columns, num_keys, K_STRIDE, True, HEAD_QK)
    value = load_tile(v, columns, num_keys, V_STRIDE, True, HEAD)

    target = offset(first, GRAD_K_STRIDE, HEAD.align) + head_k * HEAD.dim
    for p in tl.static_range(PASSES):  # one for both gradients, or one for dv and one for dk
        grad_key, grad_value = sum_over_queries(
            key, value, q_ptr, grad_out_ptr, terms_ptr, num_rows_of_all_heads, begin_q, num_queries, num_tokens, head_k,
            scale_log2, q_stride_h, grad_stride_h, Q_STRIDE, GRAD_STRIDE, p == PASSES - 1, p == 0,
            GROUP, BLOCK_M, PRECISION, HEAD, HEAD_QK,
        )  # fmt: skip
        if p == 0:
            store_tile(grad_v_ptr + target, grad_value, columns, num_keys, GRAD_K_STRIDE, HEAD)
        if p == PASSES - 1:
            store_tile(grad_k_ptr + target, scale_tile(grad_key, scale, HEAD), columns, num_keys, GRAD_K_STRIDE, HEAD)
    if UNROTATE and sequence < num_sequences:
        tl.debug_barrier()  # other threads of this program wrote some of what this one reads next
        table = offset(first, TABLE_STRIDE, ROPE.align) + offset(head_k, table_stride_h, ROPE.align)
        unrotate_in_place(grad_k_ptr + target, num_keys, cos_k_ptr + table, sin_k_ptr + table,
                          GRAD_K_STRIDE, TABLE_STRIDE, BLOCK_N, PAIRS, HEAD.align, ROPE)  # fmt: skip


@triton.jit
def add_key_tile(
    grad_query, query, cotangent, delta, high, low, k, v, first, num_keys, scale_log2,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    LAST: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_QK: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of one query tile what the BLOCK_N keys from `first` on contribute."""
    columns = tl.arange(0, BLOCK_N)
    k += offset(first, K_STRIDE, HEAD_QK.align)
    v += offset(first, V_STRIDE, HEAD.align)
    key, key_t = load_both_ways(k, columns, num_keys - first, K_STRIDE, LAST, HEAD_QK, PRECISION)
    value = load_tile(v, columns, num_keys - first, V_STRIDE, LAST, HEAD)
    scores = dot_channels(query, key_t, HEAD, PRECISION)
    weights = weights_of(scores * scale_log2 - high[:, None] - low[:, None])
    if LAST:
        weights = tl.where((columns < num_keys - first)[None, :], weights, 0.0)
    grad_scores = weights * (dot_channels(cotangent, transpose_tile(value, HEAD), HEAD, PRECISION) - delta[:, None])
    return add_dot_rows(grad_query, grad_scores.to(key[0].dtype), key, HEAD, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, terms_ptr, cos_ptr, sin_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr,
    grad_q_ptr, num_sequences, num_tokens, num_rows_of_all_heads, scale, scale_log2,
    q_stride_h, k_stride_h, v_stride_h, grad_stride_h, table_stride_h,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    GRAD_Q_STRIDE: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr,
    UNROTATE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD: tl.constexpr, HEAD_QK: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """grad_q [T, Hq, D] contiguous. Grid: (slots of query tiles, Hq)."""
    sequence, begin, first, length = find_tile(cu_seqlens_ptr, num_sequences, num_tokens, tl.program_id(0), BLOCK_M)
    if first >= length:
        return
    begin_k, num_keys = sequence_bounds(cu_seqlens_k_ptr, num_sequences, sequence)
    head = tl.program_id(1)
    num_rows = length - first
    first += begin
    rows = tl.arange(0, BLOCK_M)

    q = q_ptr + offset(first, Q_STRIDE, HEAD_QK.align) + offset(head, q_stride_h, HEAD_QK.align)
    grad_out = grad_out_ptr + offset(first, GRAD_STRIDE, HEAD.align) + offset(head, grad_stride_h, HEAD.align)
    k = k_ptr + offset(begin_k, K_STRIDE, HEAD_QK.align) + offset(head // GROUP, k_stride_h, HEAD_QK.align)
    v = v_ptr + offset(begin_k, V_STRIDE, HEAD.align) + offset(head // GROUP, v_stride_h, HEAD.align)
    query = load_tile(q, rows, num_rows, Q_STRIDE, True, HEAD_QK)
    cotangent = load_tile(grad_out, rows, num_rows, GRAD_STRIDE, True, HEAD)
    terms = terms_ptr + offset(head, num_tokens, 1) + first
    delta, high, low = load_row_terms(terms, num_rows_of_all_heads, rows, num_rows, True)
    grad_query = zero_tile(BLOCK_M, HEAD)
    CHECK: tl.constexpr = PRECISION == "tf32x3"  # in every tile: there are no registers for a second, unchecked body
    whole = num_keys if CHECK else num_keys // BLOCK_N * BLOCK_N
    for first_key in range(0, whole, BLOCK_N):
        grad_query = add_key_tile(
            grad_query, query, cotangent, delta, high, low, k, v, first_key, num_keys, scale_log2,
            K_STRIDE, V_STRIDE, CHECK, BLOCK_N, PRECISION, HEAD, HEAD_QK,
        )  # fmt: skip
    if whole < num_keys:
        grad_query = add_key_tile(
            grad_query, query, cotangent, delta, high, low, k, v, whole, num_keys, scale_log2,
            K_STRIDE, V_STRIDE, True, BLOCK_N, PRECISION, HEAD, HEAD_QK,
        )  # fmt: skip

    target = grad_q_ptr + offset(first, GRAD_Q_STRIDE, HEAD.align) + head * HEAD.dim
    store_tile(target, scale_tile(grad_query, scale, HEAD), rows, num_rows, GRAD_Q_STRIDE, HEAD)
    if UNROTATE and sequence < num_sequences:
        tl.debug_barrier()  # other threads of this program wrote some of what this one reads next
        table = offset(first, TABLE_STRIDE, ROPE.align) + offset(head, table_stride_h, ROPE.align)
        unrotate_in_place(target, num_rows, cos_ptr + table, sin_ptr + table,
                          GRAD_Q_STRIDE, TABLE_STRIDE, BLOCK_M, PAIRS, HEAD.align, ROPE)  # fmt: skip


def row_terms(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, cu_seqlens: Tensor, head: Head) -> Tensor:
    """terms [3, Hq, T], float32; see the kernel."""
    num_tokens, num_heads = out.shape[:2]
    terms = torch.empty(3, num_heads, num_tokens, dtype=torch.float32, device=out.device)
    launch(
        row_terms_kernel, (cdiv(num_tokens, 64), num_heads),
        out, grad_out, lse, grad_lse, terms, cu_seqlens,
        cu_seqlens.shape[0] - 1, num_tokens, terms.stride(0), grad_out.stride(1),
        OUT_STRIDE=out.stride(0), GRAD_STRIDE=grad_out.stride(0), BLOCK=64, HAS_GRAD_LSE=grad_lse is not None, HEAD=head,
        num_warps=4,
    )  # fmt: skip
    return terms


def query_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Tensor, tables: tuple, rope: Rope, unrotate: bool,
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, head: Head, head_qk: Head, precision: str, config: TileConfig,
) -> Tensor:  # fmt: skip
    """dq [T, Hq, D]. q and k are the rotated ones; unrotate: the gradient of q before its rotation, else of this q."""
    num_tokens, num_heads = q.shape[:2]
    num_sequences, (cos, sin) = cu_seqlens.shape[0] - 1, tables
    grad_q = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    launch(
        query_gradient_kernel, (num_tokens // config.block_m + num_sequences + 1, num_heads),
        q, k, v, grad_out, terms, cos, sin, cu_seqlens, cu_seqlens_k, grad_q,
        num_sequences, num_tokens, terms.stride(0), scale, scale * LOG2E,
        q.stride(1), k.stride(1), v.stride(1), grad_out.stride(1), head_stride(cos),
        Q_STRIDE=q.stride(0), K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), GRAD_STRIDE=grad_out.stride(0),
        GRAD_Q_STRIDE=grad_q.stride(0), TABLE_STRIDE=token_stride(cos),
        GROUP=num_heads // k.shape[1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PAIRS=next_power_of_2(rope.num_pairs), UNROTATE=unrotate, PRECISION=precision,
        HEAD=head, HEAD_QK=head_qk, ROPE=rope,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return grad_q


def key_value_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Tensor, tables: tuple, rope: Rope, unrotate: bool,
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, head: Head, head_qk: Head, precision: str, config: TileConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dk, dv) [Tk, Hkv, D]. q and k are the rotated ones; unrotate: the gradient of k before its rotation, else of this k."""
    num_tokens_k, num_heads_k = k.shape[:2]
    num_sequences, (cos, sin) = cu_seqlens.shape[0] - 1, tables
    grad_k = torch.empty_like(v, memory_format=torch.contiguous_format)
    grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
    launch(
        key_value_gradient_kernel, (num_tokens_k // config.block_n + num_sequences + 1, num_heads_k),
        q, k, v, grad_out, terms, cos, sin, cu_seqlens, cu_seqlens_k, grad_k, grad_v,
        num_sequences, q.shape[0], num_tokens_k, terms.stride(0), scale, scale * LOG2E,
        q.stride(1), k.stride(1), v.stride(1), grad_out.stride(1), head_stride(cos),
        Q_STRIDE=q.stride(0), K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), GRAD_STRIDE=grad_out.stride(0),
        GRAD_K_STRIDE=grad_k.stride(0), TABLE_STRIDE=token_stride(cos),
        GROUP=q.shape[1] // num_heads_k, PASSES=config.num_passes, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PAIRS=next_power_of_2(rope.num_pairs), UNROTATE=unrotate, PRECISION=precision,
        HEAD=head, HEAD_QK=head_qk, ROPE=rope,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return grad_k, grad_v
