"""From hidden states to losses: the next-token loss (CoMP, arXiv 2503.18931v2, Eq. 6) and the pooling of features (Eq. 7)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .data.batch import IGNORED

LOGITS_AT_ONCE = 2**25
"""Elements of the largest [tokens, vocabulary] tensor that is made at a time: 128 MiB in float32."""


def next_token_loss(
    hidden: Tensor, labels: Tensor, lm_head: Callable[[Tensor], Tensor], vocabulary: int, logits_at_once: int = LOGITS_AT_ONCE
) -> tuple[Tensor, int]:
    """Sum of -log p(label | what precedes it) over the learned positions, and how many they are.

    hidden:      [B, L, D] last hidden states.
    labels:      [B, L] int64, not shifted: hidden[:, i] predicts labels[:, i + 1]. IGNORED is not learned.
    lm_head:     [n, D] -> [n, vocabulary]. It is applied to learned positions only, in chunks whose logits have at most
                 `logits_at_once` elements and are recomputed in the backward pass where there is more than one chunk.
    Returns (float32 scalar, count). Without learned positions the loss is 0, still attached to the graph of `hidden`.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED
    predictors, targets = hidden[:, :-1][learned], targets[learned]

    def summed(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(lm_head(rows).float(), wanted, reduction="sum")

    chunk = max(1, logits_at_once // vocabulary)
    if len(targets) <= chunk:
        # also reached without any learned position: the empty sum keeps the graph, on every rank the same one
        return summed(predictors, targets), len(targets)
    parts = [
        checkpoint(summed, rows, wanted, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted in zip(predictors.split(chunk), targets.split(chunk))
    ]
    return torch.stack(parts).sum(), len(targets)


def mean_by_segment(x: Tensor, lengths: list[int]) -> Tensor:
    """Mean of consecutive rows: x [sum(lengths), D] -> [len(lengths), D] float32; zeros where a length is 0."""
    counts = torch.tensor(lengths, device=x.device)
    sums = torch.segment_reduce(x.float(), "sum", lengths=counts, axis=0)  # deterministic, unlike index_add on a GPU
    return sums / counts.clamp(min=1).unsqueeze(1)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions of each row: hidden [B, L, D], mask [B, L] -> [B, D] float32; zeros for empty rows."""
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
