"""Forward kernel of rope_attention: one program per query tile, a loop over the key tiles of its sequence.

Queries are rotated in registers while they are loaded. Keys arrive rotated, or are rotated here when INLINE_K (short
sequences: see README.md). So the loop over long sequences holds no trace of the rotation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import launch
from ..._units import LN2
from .triton_configs import TileConfig
from .triton_rotation import head_stride, token_stride
from .triton_tiles import (
    VARYING,
    Head,
    Rope,
    add_dot_rows,
    dot_channels,
    find_tile,
    load_rotated_tile,
    load_tile,
    offset,
    online_softmax_update,
    scale_tile,
    sequence_bounds,
    store_tile,
    transpose_tile,
    zero_tile,
)

LN_2: tl.constexpr = tl.constexpr(LN2)


@triton.jit
def attend_key_tile(
    query, row_shift, row_sum, accumulator, k, v, cos_k, sin_k, first, num_keys, scale_log2,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, TABLE_K_STRIDE: tl.constexpr,
    LAST: tl.constexpr, BLOCK_N: tl.constexpr, INLINE_K: tl.constexpr, PRECISION: tl.constexpr,
    HEAD: tl.constexpr, HEAD_K: tl.constexpr, ROPE_K: tl.constexpr,
):  # fmt: skip
    """Take the BLOCK_N keys from `first` on into the softmax; LAST: some of them may lie beyond the sequence."""
    columns = tl.arange(0, BLOCK_N)
    k += offset(first, K_STRIDE, HEAD_K.align)
    v += offset(first, V_STRIDE, HEAD.align)
    if INLINE_K:
        cos_k += offset(first, TABLE_K_STRIDE, ROPE_K.align)
        sin_k += offset(first, TABLE_K_STRIDE, ROPE_K.align)
        key = load_rotated_tile(k, columns, num_keys - first, K_STRIDE, cos_k, sin_k, TABLE_K_STRIDE, HEAD_K, ROPE_K)
    else:
        key = load_tile(k, columns, num_keys - first, K_STRIDE, LAST, HEAD_K)
    scores = dot_channels(query, transpose_tile(key, HEAD), HEAD, PRECISION)  # [BLOCK_M, BLOCK_N]
    if LAST:
        scores = tl.where((columns < num_keys - first)[None, :], scores, -float("inf"))
    value = load_tile(v, columns, num_keys - first, V_STRIDE, LAST, HEAD)
    weights, row_shift, row_sum, accumulator = online_softmax_update(scores, row_shift, row_sum, accumulator, scale_log2, HEAD)
    return row_shift, row_sum, add_dot_rows(accumulator, weights.to(value[0].dtype), value, HEAD, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, cos_k_ptr, sin_k_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, out_ptr, lse_ptr,
    num_sequences, num_tokens, scale_log2,
    q_stride_h, k_stride_h, v_stride_h, table_stride_h, table_k_stride_h,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,
    TABLE_STRIDE: tl.constexpr, TABLE_K_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INLINE_K: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD: tl.constexpr, HEAD_K: tl.constexpr, ROPE: tl.constexpr, ROPE_K: tl.constexpr,
):  # fmt: skip
    """out [T, Hq, D] contiguous, lse [Hq, T]. Grid: (slots of query tiles, Hq); GROUP query heads share a key head."""
    sequence, begin, first, length = find_tile(cu_seqlens_ptr, num_sequences, num_tokens, tl.program_id(0), BLOCK_M)
    if first >= length:
        return
    begin_k, num_keys = sequence_bounds(cu_seqlens_k_ptr, num_sequences, sequence)
    head = tl.program_id(1)
    num_rows = length - first
    first += begin
    rows = tl.arange(0, BLOCK_M)

    q = q_ptr + offset(first, Q_STRIDE, HEAD.align) + offset(head, q_stride_h, HEAD.align)
    k = k_ptr + offset(begin_k, K_STRIDE, HEAD_K.align) + offset(head // GROUP, k_stride_h, HEAD_K.align)
    v = v_ptr + offset(begin_k, V_STRIDE, HEAD.align) + offset(head // GROUP, v_stride_h, HEAD.align)
    cos = cos_ptr
    sin = sin_ptr
    if ROPE.num_pairs > 0:
        table = offset(first, TABLE_STRIDE, ROPE.align) + offset(head, table_stride_h, ROPE.align)
        cos += table
        sin += table
    cos_k = cos_k_ptr
    sin_k = sin_k_ptr
    if INLINE_K:
        table_k = offset(begin_k, TABLE_K_STRIDE, ROPE_K.align) + offset(head // GROUP, table_k_stride_h, ROPE_K.align)
        cos_k += table_k
        sin_k += table_k

    # Rows beyond the last sequence have no keys and are not read.
    num_loaded = tl.where(num_keys > 0, num_rows, 0)
    query = load_rotated_tile(q, rows, num_loaded, Q_STRIDE, cos, sin, TABLE_STRIDE, HEAD, ROPE)
    if NEGATE:  # a negative scale: the running maximum wants a positive one
        query = scale_tile(query, -1.0, HEAD)
    row_shift = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = zero_tile(BLOCK_M, HEAD)
    CHECK: tl.constexpr = PRECISION == "tf32x3"  # in every tile: there are no registers for a second, unchecked body
    whole = num_keys if CHECK else num_keys // BLOCK_N * BLOCK_N
    for first_key in range(0, whole, BLOCK_N):
        row_shift, row_sum, accumulator = attend_key_tile(
            query, row_shift, row_sum, accumulator, k, v, cos_k, sin_k, first_key, num_keys, scale_log2,
            K_STRIDE, V_STRIDE, TABLE_K_STRIDE, CHECK, BLOCK_N, INLINE_K, PRECISION, HEAD, HEAD_K, ROPE_K,
        )  # fmt: skip
    if whole < num_keys:
        row_shift, row_sum, accumulator = attend_key_tile(
            query, row_shift, row_sum, accumulator, k, v, cos_k, sin_k, whole, num_keys, scale_log2,
            K_STRIDE, V_STRIDE, TABLE_K_STRIDE, True, BLOCK_N, INLINE_K, PRECISION, HEAD, HEAD_K, ROPE_K,
        )  # fmt: skip

    has_keys = num_keys > 0
    lse = (row_shift.to(tl.float64) + tl.log2(row_sum)) * tl.full((BLOCK_M,), LN_2, tl.float64)
    lse = tl.where(has_keys, lse, -float("inf"))
    tl.store(lse_ptr + head.to(tl.int64) * num_tokens + first + rows, lse, mask=rows < num_rows)
    inverse_sum = tl.where(has_keys, 1.0 / row_sum, 0.0)
    out = out_ptr + offset(first, OUT_STRIDE, HEAD.align) + head * HEAD.dim
    store_tile(out, scale_tile(accumulator, inverse_sum[:, None], HEAD), rows, num_rows, OUT_STRIDE, HEAD)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, tables: tuple, tables_k: tuple | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor,
    scale_log2: float, head: Head, head_k: Head, rope: Rope, rope_k: Rope, precision: str, config: TileConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse). k is rotated already, as [Tk, Hkv, D padded], unless tables_k are given: then it is rotated in the loop."""
    num_tokens, num_heads = q.shape[:2]
    num_sequences = cu_seqlens.shape[0] - 1
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float64, device=q.device)  # as the kernel makes it
    (cos, sin), (cos_k, sin_k) = tables, tables_k or (None, None)
    launch(
        attention_forward_kernel, (num_tokens // config.block_m + num_sequences + 1, num_heads),
        q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, out, lse,
        num_sequences, num_tokens, max(abs(scale_log2), 1e-30),  # a scale of zero would meet a maximum of -inf
        q.stride(1), k.stride(1), v.stride(1), head_stride(cos), head_stride(cos_k),
        Q_STRIDE=q.stride(0), K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), OUT_STRIDE=out.stride(0),
        TABLE_STRIDE=token_stride(cos), TABLE_K_STRIDE=token_stride(cos_k),
        GROUP=num_heads // k.shape[1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        INLINE_K=tables_k is not None, NEGATE=scale_log2 < 0, PRECISION=precision,
        HEAD=head, HEAD_K=head_k, ROPE=rope, ROPE_K=rope_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
