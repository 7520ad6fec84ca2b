"""The definition of rope_attention in plain PyTorch: rotate, then attend within each sequence.

Written to be read, not to be fast: one Python iteration per sequence, the full score matrix in memory. Differentiable by
autograd to any order in q, k, v, cos and sin. Every other backend is tested against this file in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widen_table(table: Tensor, rotary_dim: int, pair_stride: int) -> Tensor:
    """Return a full-width table [..., rotary_dim] from one that may hold one value per pair, [..., rotary_dim / 2].

    Pairs are numbered in channel order: pair `block * p + j` joins channels `block * 2p + j` and `block * 2p + p + j`.
    """
    if table.shape[-1] == rotary_dim:
        return table
    per_block = table.unflatten(-1, (-1, 1, pair_stride))
    return per_block.expand(*per_block.shape[:-2], 2, pair_stride).flatten(-3)


def swap_pairs(x: Tensor, pair_stride: int) -> Tensor:
    """Map every pair (a, b) of channels that are `pair_stride` apart to (-b, a).

    For six channels and pair_stride 3: [x0 x1 x2 x3 x4 x5] -> [-x3 -x4 -x5 x0 x1 x2]; for pair_stride 1:
    [-x1 x0 -x3 x2 -x5 x4].
    """
    first, second = x.unflatten(-1, (-1, 2, pair_stride)).unbind(-2)
    return torch.stack((-second, first), dim=-2).flatten(-3)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, pair_stride: int) -> Tensor:
    """Apply y = x * cos + swap_pairs(x) * sin to the first `rotary_dim` channels of x [T, H, D]; the rest pass through.

    cos and sin are [T, W] (one table for all heads) or [T, H, W], W = rotary_dim or rotary_dim / 2.
    """
    cos, sin = (widen_table(table, rotary_dim, pair_stride) for table in (cos, sin))
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = x[..., :rotary_dim]
    turned = turned * cos + swap_pairs(turned, pair_stride) * sin
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    rotary_dim: int | None = None,
    pair_stride: int | None = None,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences with rotary embedding of q and k; shapes as `comp_kernels.rope_attention`.

        for sequence (queries i, keys j) and head h:
            S = scale * rotate(q_i) . rotate(k_j)      P = softmax_j(S)      out_i = sum_j P v_j      lse_i = log sum_j exp S

    The arithmetic is done in float32, or float64 for float64 inputs, and rounded to the dtype of q once at the end.
    A query whose sequence has no keys, and every row beyond cu_seqlens[-1], has out = 0 and lse = -inf.
    """
    if (cos is None) != (sin is None) or (cos_k is None) != (sin_k is None):
        raise ValueError("cos and sin, and cos_k and sin_k, come in pairs: one of a pair is missing")
    num_tokens, num_heads, head_dim = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    pair_stride = rotary_dim // 2 if pair_stride is None else pair_stride
    scale = head_dim**-0.5 if scale is None else scale
    if cos is not None and cos_k is None:
        cos_k, sin_k = cos, sin

    bounds_q = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    if cu_seqlens_k is not None:
        bounds_k = cu_seqlens_k.tolist()
    else:
        bounds_k = bounds_q if cu_seqlens is not None else [0, k.shape[0]]

    outputs, lses = [], []
    for start_q, end_q, start_k, end_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        q_i, k_j, v_j = q[start_q:end_q].to(compute), k[start_k:end_k].to(compute), v[start_k:end_k].to(compute)
        if cos is not None and sin is not None:
            cos_i, sin_i = cos[start_q:end_q].to(compute), sin[start_q:end_q].to(compute)
            q_i = rotate(q_i, cos_i, sin_i, rotary_dim, pair_stride)
        if cos_k is not None and sin_k is not None:
            cos_j, sin_j = cos_k[start_k:end_k].to(compute), sin_k[start_k:end_k].to(compute)
            k_j = rotate(k_j, cos_j, sin_j, rotary_dim, pair_stride)
        group = num_heads // k.shape[1]  # query heads that share one key head
        k_j, v_j = k_j.repeat_interleave(group, dim=1), v_j.repeat_interleave(group, dim=1)
        if end_k == start_k:
            outputs.append(torch.zeros_like(q_i))  # of NaN as well
            lses.append(q_i.new_full((num_heads, end_q - start_q), -torch.inf))
            continue
        scores = torch.einsum("ihd,jhd->hij", q_i, k_j) * scale
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), v_j))
        lses.append(scores.logsumexp(dim=-1))

    slack = num_tokens - bounds_q[-1]
    outputs.append(q.new_zeros((slack, num_heads, head_dim), dtype=compute))
    lses.append(q.new_full((num_heads, slack), -torch.inf, dtype=compute))
    # 0: without any sequence, or any key, there is still a gradient, of zeros
    attached = sum(x[:0].sum(dtype=compute) for x in (q, k, v, cos, sin, cos_k, sin_k) if x is not None)
    out = (torch.cat(outputs) + attached).to(q.dtype)
    return (out, torch.cat(lses, dim=1)) if return_lse else out
