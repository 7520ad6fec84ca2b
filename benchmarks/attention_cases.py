"""Calls of rope_attention as vision towers make them, and the largest error of ours on them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from comp_kernels.ops.rope_attention import reference
from comp_kernels.testing import AttentionCase, AttentionInputs, make_attention_inputs


def case(name: str, lengths: list[int], heads: int, head_dim: int) -> AttentionCase:
    return AttentionCase(name, lengths, heads=heads, head_dim=head_dim, packed_qkv=True)


CASES = {
    c.name: c
    for c in (
        case("vit_s_224", [197] * 8, 6, 64),
        case("dinov2_l_224", [257] * 4, 16, 64),
        case("aimv2_l_224", [256] * 4, 8, 128),
        case("so400m_384", [729] * 2, 16, 72),
        case("qwen25vl_windows", [64] * 48, 16, 80),
        case("native_mix", [1024, 576, 256, 144, 100, 64, 33], 16, 72),  # So400m, areas of a skewed histogram
        case("many_small", [36, 49, 64, 25, 81, 100, 16, 144] * 4, 16, 64),  # thumbnails, DINOv2-L
        case("one_long_image", [2304], 16, 72),  # So400m at 672 px
    )
}


def operations(case: AttentionCase) -> float:
    """Of one forward pass: two products of L x L x D per head, 2 operations per multiply-add; rotation and softmax not counted.
    A backward pass has five such products: 2.5 times as many."""
    return 4.0 * case.heads * case.head_dim * sum(n * n for n in case.lengths)


def inputs_of(case: AttentionCase, dtype: torch.dtype = torch.float32) -> AttentionInputs:
    return make_attention_inputs(case, dtype)


def largest_error(function: Callable, inputs: AttentionInputs, heads: int = 1) -> float:
    """Of `function(q, k, v, cos, sin, cu_seqlens)` on the first heads against float64; heads do not touch each other."""
    q, k, v = (x[:, :heads] for x in (inputs.q, inputs.k, inputs.v))
    tables = (inputs.cos, inputs.sin)
    exact = reference.rope_attention(
        *(x.double() for x in (q, k, v, *tables)),
        inputs.cu_seqlens,
        rotary_dim=inputs.kwargs["rotary_dim"],
        pair_stride=inputs.kwargs["pair_stride"],
    )
    return (function(q, k, v, *tables, inputs.cu_seqlens).double() - exact).abs().max().item()
