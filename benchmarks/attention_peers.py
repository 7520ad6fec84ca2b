"""What a user could pick instead of rope_attention on the CPU: rotary embedding compiled by inductor, then torch's attention.

Every peer is `function(q, k, v)` -> out, all [T, H, D], for one set of lengths; a peer that cannot serve them is not listed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from comp_kernels.testing import AttentionCase, AttentionInputs

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.compile(dynamic=True)
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The "rotate half" rotary embedding of q and k, fused into one pass over memory."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def swap(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    return (q * cos + swap(q) * sin).to(q.dtype), (k * cos + swap(k) * sin).to(k.dtype)


def sdpa_loop(case: AttentionCase, inputs: AttentionInputs) -> Attention:
    """torch's fused attention, one call per image."""

    def attention(q, k, v):
        q, k = rotate(q, k, inputs.cos, inputs.sin)
        images = zip(*(x.split(case.lengths) for x in (q, k, v)))
        outs = [F.scaled_dot_product_attention(*(x.transpose(0, 1).unsqueeze(0) for x in image)) for image in images]
        return torch.cat([out.squeeze(0).transpose(0, 1) for out in outs])

    return attention


def sdpa_batched(case: AttentionCase, inputs: AttentionInputs) -> Attention:
    """One call for all images; they must have equal lengths."""

    def attention(q, k, v):
        q, k = rotate(q, k, inputs.cos, inputs.sin)
        batch = (x.unflatten(0, (len(case.lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1)

    return attention


def sdpa_padded(case: AttentionCase, inputs: AttentionInputs) -> Attention:
    """One call for all images, padded to the longest, with a mask."""
    longest, lengths = max(case.lengths), torch.tensor(case.lengths)
    valid = torch.arange(longest) < lengths[:, None]
    rows = valid.flatten().nonzero().squeeze(1)
    mask = valid[:, None, None, :]

    def attention(q, k, v):
        def pad(x):
            padded = x.new_zeros(len(case.lengths) * longest, *x.shape[1:]).index_copy(0, rows, x)
            return padded.unflatten(0, (-1, longest)).transpose(1, 2)

        q, k = rotate(q, k, inputs.cos, inputs.sin)
        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, rows)

    return attention


def nested_jagged(case: AttentionCase, inputs: AttentionInputs) -> Attention:
    """torch's nested tensors: the only packed attention of torch that trains on the CPU."""
    offsets = inputs.cu_seqlens.long()
    bounds = {"min_seqlen": min(case.lengths), "max_seqlen": max(case.lengths)}

    def attention(q, k, v):
        q, k = rotate(q, k, inputs.cos, inputs.sin)
        jagged = (torch.nested.nested_tensor_from_jagged(x.contiguous(), offsets, **bounds).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*jagged).transpose(1, 2).values()

    return attention


def flex(case: AttentionCase, inputs: AttentionInputs) -> Attention:
    """flex_attention with a mask per image; it has no backward on the CPU. The block mask is built beforehand.

    Compiled for the shapes of the case: with dynamic shapes torch 2.13 writes C++ that does not compile (cur_qSplitSize8).
    """
    torch.compiler.reset()  # else the cases before count against the limit of recompilations
    compiled_flex_attention = torch.compile(flex_attention, dynamic=False)
    document = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths))
    tokens = len(document)
    block_mask = create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, tokens, tokens, device="cpu")

    def attention(q, k, v):
        q, k = rotate(q, k, inputs.cos, inputs.sin)
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return compiled_flex_attention(*heads_first, block_mask=block_mask).squeeze(0).transpose(0, 1)

    return attention


def peers_of(case: AttentionCase, inputs: AttentionInputs, *, training: bool) -> dict[str, Attention]:
    """The peers that can serve `case`, by name; with BENCHMARK_PEERS=sdpa_loop,sdpa_batched set, those of them alone."""
    makers: dict[str, Callable] = {make.__name__: make for make in (sdpa_loop, sdpa_batched, sdpa_padded, nested_jagged, flex)}
    wanted = os.environ.get("BENCHMARK_PEERS", ",".join(makers)).split(",")
    if unknown := set(wanted) - set(makers):
        raise ValueError(f"BENCHMARK_PEERS names {', '.join(sorted(unknown))}; peers are {', '.join(makers)}")
    equal = len(set(case.lengths)) == 1
    serves = dict(
        sdpa_batched=equal and len(case.lengths) > 1,
        sdpa_padded=not equal,
        flex=not training,
    )
    return {name: makers[name](case, inputs) for name in makers if name in wanted and serves.get(name, True)}
