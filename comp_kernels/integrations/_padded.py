"""Attention over padded batches [B, S, H, D] with `rope_attention`: what a mask and a batch mean as packed sequences."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import has_values
from ..ops.rope_attention import rope_attention
from ._patching import UnsupportedCall

MASKED = -3e4  # additive masks at or below this hide a key: finfo.min of every dtype lies below


@dataclass(frozen=True)
class Blocks:
    """Which keys each query sees: the flattened queries [B * S] in runs, and one set of keys for every run."""

    cu_seqlens: Tensor  # [runs + 1] int32
    cu_seqlens_k: Tensor | None  # [runs + 1] int32; None: the keys of a run are its own tokens
    keys: Tensor | None  # rows of the flattened keys in the order of cu_seqlens_k; None: all of them


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    tables: tuple[Tensor, Tensor] | None,
    *,
    scale: float | None,
    pair_stride: int | None,
    backend: str | None,
) -> Tensor:
    """rope_attention of q [B, S, Hq, D] and k, v [B, S, Hkv, D], any strides; returns [B, S, Hq, D].

    tables: (cos, sin), each as `token_tables` returns it, or None.
    """
    batch, tokens = q.shape[:2]
    # A norm of q and k may widen them (autocast); attention runs in the dtype of v, as it does in the original modules.
    q, k, v = (x.flatten(0, 1).to(v.dtype) for x in (q, k, v))
    cos, sin = tables or (None, None)
    cos_k = sin_k = None
    if blocks.keys is not None:
        k, v = k[blocks.keys], v[blocks.keys]
        if cos is not None and sin is not None:
            cos_k, sin_k = cos[blocks.keys], sin[blocks.keys]
    out = rope_attention(
        q,
        k,
        v,
        cos,
        sin,
        blocks.cu_seqlens,
        cos_k=cos_k,
        sin_k=sin_k,
        cu_seqlens_k=blocks.cu_seqlens_k,
        pair_stride=pair_stride,
        scale=scale,
        backend=backend,
    )
    return out.unflatten(0, (batch, tokens))


def token_tables(cos: Tensor, sin: Tensor, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Tables of all B * S tokens, [B * S, W] or [B * S, H, W], from tables of the patches.

    cos, sin: [S', W] for every image, or [B or 1, S', W], or per head [B or 1, S', H, W]. S' may be smaller than S: the
        tokens before the patches (CLS, registers) then get identity rows.
    """

    def expand(table: Tensor, identity: float) -> Tensor:
        if table.dim() == 2:
            table = table[None]
        prefix = tokens - table.shape[1]
        if prefix < 0:  # a negative padding would cut the first rows off
            raise ValueError(f"cos and sin must have at most one row for each of the {tokens} tokens, got {table.shape[1]}")
        if prefix:
            table = F.pad(table, (0, 0) * (table.dim() - 2) + (prefix, 0), value=identity)
        return table.expand(batch, *table.shape[1:]).flatten(0, 1)

    return expand(cos, 1.0), expand(sin, 0.0)


def blocks_of(mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Blocks:
    """The runs of queries that see the same keys.

    mask: None (every token sees its whole image), [B, S] (keys, True or non-zero = visible), or [B or 1, 1, S or 1, S],
        bool (True = visible) or additive (0 = visible, very negative = hidden).

    Served are masks in which no key is seen by two runs: padding, images packed one after the other, windows. Any other
    mask, a bias in the scores say, raises UnsupportedCall. A query that sees no key gets zeros. Reading a mask needs its
    values, so on a GPU it waits for them, once per mask: all layers of a model pass the same tensor (a mask
    made in inference mode is read in every layer), and torch.export has none.
    """
    if mask is not None and not isinstance(mask, Tensor):  # flex_attention's BlockMask
        raise UnsupportedCall(f"attention mask must be a tensor, got {type(mask).__name__}")
    if mask is None:
        return Blocks(torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens, None, None)
    if not has_values(mask) or torch.compiler.is_exporting():
        raise UnsupportedCall(
            "attention mask must have values to read: none on the meta device and while torch.export traces. Leave it out"
        )
    return _LAST_MASK.blocks(mask, batch, tokens)


class _LastMask:
    """The blocks of the mask that was read last."""

    def __init__(self):
        # mask, key, blocks: one tuple, so that threads see all of it or nothing
        self.last: tuple[Callable[[], Tensor | None], object, Blocks | None] = (lambda: None, None, None)

    @torch.compiler.disable
    def blocks(self, mask: Tensor, batch: int, tokens: int) -> Blocks:
        if mask.is_inference():  # it counts no versions: a change in place would go unnoticed
            return _read_mask(_visible(mask, batch, tokens))
        # Blocks made in inference mode cannot be trained on; with a number of tokens that the mask does not fit, it is refused.
        key = (batch, tokens, mask._version, torch.is_inference_mode_enabled())
        last_mask, last_key, blocks = self.last
        if blocks is None or last_mask() is not mask or last_key != key:
            blocks = _read_mask(_visible(mask, batch, tokens))
            self.last = (weakref.ref(mask), key, blocks)
        return blocks


_LAST_MASK = _LastMask()


def _visible(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """Bool [B, S or 1, S], True where the query sees the key."""
    came = tuple(mask.shape)
    if mask.dim() == 2:
        if mask.is_floating_point() and bool((mask < 0).any()):  # an additive mask, in which 0 means visible
            raise UnsupportedCall("attention mask [B, S] must be true or not zero where a key is visible, got negative values")
        mask = mask[:, None, None, :].bool()
    sizes = ((1, batch), (1,), (1, tokens), (tokens,))
    if mask.dim() != 4 or any(size not in allowed for size, allowed in zip(mask.shape, sizes)):
        raise UnsupportedCall(
            f"attention mask must be [B, S] or [B or 1, 1, S or 1, S] with B = {batch} and S = {tokens}, got {came}"
        )
    if mask.dtype != torch.bool:
        visible, hidden = mask == 0, mask <= MASKED
        if not bool((visible | hidden).all()):
            raise UnsupportedCall("attention mask holds values other than 0 and very negative ones: a bias is not served")
        mask = visible
    return mask[:, 0].expand(batch, -1, -1)


def _read_mask(visible: Tensor) -> Blocks:
    """The blocks of a mask [B, S or 1, S]. Two images of up to four tokens, the second padded by one:

        mask [[1, 1, 1, 1],    visible [2, 1, 4]: one run per image, starts [0, 1] of rows, sets = mask
              [1, 1, 1, 0]]    keys [0, 1, 2, 3, 4, 5, 6], counts [0, 4, 7] of keys, ends [0, 4, 8] of queries

    with counts and ends cumulative. If every query has a row of its own, visible [2, 4, 4], starts are [0, 4].
    """
    batch, rows, tokens = visible.shape
    device = visible.device
    changes = torch.ones(batch, rows, dtype=torch.bool, device=device)
    changes[:, 1:] = (visible[:, 1:] != visible[:, :-1]).any(-1)
    starts = changes.flatten().nonzero().squeeze(1)  # first row of every run, in [0, B * rows)
    sets = visible.reshape(batch * rows, tokens)[starts]  # [runs, S]
    image = starts // rows
    seen = torch.zeros(batch, tokens, dtype=torch.int32, device=device).index_add_(0, image, sets.int())
    if bool((seen > 1).any()):
        raise UnsupportedCall(
            "attention mask has no block structure: some keys are seen by several runs of queries, but not by all"
        )
    run, key = sets.nonzero(as_tuple=True)
    keys = image[run] * tokens + key
    ends = torch.cat((starts * (tokens // rows), starts.new_tensor([batch * tokens])))  # rows is S, or 1: one run per image
    counts = F.pad(sets.sum(1).cumsum(0), (1, 0))
    if torch.equal(counts, ends) and torch.equal(keys, torch.arange(batch * tokens, device=device)):
        return Blocks(ends.int(), None, None)
    return Blocks(ends.int(), counts.int(), keys)
