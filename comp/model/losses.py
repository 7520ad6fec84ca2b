"""From hidden states to losses: the next-token loss (CoMP, arXiv 2503.18931v2, Eq. 6), the pooling of features (Eq. 7), and
the contrastive loss that Table 5b sets against the alignment loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from comp_kernels import alignment_loss
from comp_kernels.ops.alignment_loss.reference import unit_rows

from ..data.batch import IGNORED

LOGITS_AT_ONCE = 2**25
"""Elements of the largest [tokens, vocabulary] tensor that is made at a time: 128 MiB in float32."""


def next_token_loss(
    hidden: Tensor,
    labels: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    vocabulary: int,
    logits_at_once: int = LOGITS_AT_ONCE,
    per_sample: bool = False,
) -> tuple[Tensor, int]:
    """Sum of -log p(label | what precedes it) over the learned positions, and how many they are.

    hidden:      [B, L, D] last hidden states.
    labels:      [B, L] int64, not shifted: hidden[:, i] predicts labels[:, i + 1]. IGNORED is not learned.
    lm_head:     [n, D] -> [n, vocabulary]. It is applied to learned positions only, in chunks whose logits have at most
                 `logits_at_once` elements and are recomputed in the backward pass where there is more than one chunk.
    per_sample:  sum the means of the rows instead, 1/T for each of the T learned positions of a row (Eq. 6).
    Returns (float32 scalar, count). Without learned positions the loss is 0, still attached to the graph of `hidden`.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED
    predictors, targets = hidden[:, :-1][learned], targets[learned]
    lengths = learned.sum(1, keepdim=True)
    shares = (1 / lengths.clamp(min=1)).expand_as(learned)[learned] if per_sample else None

    def summed(rows: Tensor, wanted: Tensor, share: Tensor | None) -> Tensor:
        if share is None:
            return F.cross_entropy(lm_head(rows).float(), wanted, reduction="sum")
        return (F.cross_entropy(lm_head(rows).float(), wanted, reduction="none") * share).sum()

    chunk = max(1, logits_at_once // vocabulary)
    if len(targets) <= chunk:
        # also reached without any learned position: the empty sum keeps the graph, on every rank the same one
        return summed(predictors, targets, shares), len(targets)
    share_chunks = itertools.repeat(None) if shares is None else shares.split(chunk)
    parts = [
        checkpoint(summed, rows, wanted, share, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted, share in zip(predictors.split(chunk), targets.split(chunk), share_chunks)
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


def contrastive_loss(
    vision: Tensor, text: Tensor, *, temperature: float, valid: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """InfoNCE from images to texts: each image feature must pick its own text among all valid texts of the group.

        loss = mean_b -log softmax_j(cos(vision_b, text_j) / temperature)[b]

    vision:  [n, E] float, the features that learn. A row of zeros has cosine 0 with every text and receives no gradient.
    text:    [n, E] float, fixed. The paper names a contrastive loss without a formula; this direction alone is used because the
             other one would tie the image features of several forward passes of a step together.
    valid:   [n] bool, rows that count, as image and as text.
    group:   the n rows are this process's share. The value is the mean over the group's valid rows, the gradient that of the
             local rows, to be summed over the processes, as in `comp_kernels.alignment_loss`.
    Returns a float scalar, 0 (attached to the graph) where no row is valid.
    """
    every_text, every_valid, first = text.detach(), valid, 0
    if group is not None:
        every_text, every_valid, first = _gather_rows(every_text, valid, group)
    places = every_valid.cumsum(0)[first : first + len(valid)] - 1  # of the own texts among the valid ones
    cosines = unit_rows(vision[valid]) @ F.normalize(every_text[every_valid].to(vision.dtype), dim=1).T
    total = F.cross_entropy(cosines / temperature, places[valid], reduction="sum")
    return _mean_over_group(total, valid, group)


def chunked_alignment_loss(
    vision: Tensor,
    text: Tensor,
    prototypes: Tensor,
    *,
    chunk: int,
    valid: Tensor,
    group: dist.ProcessGroup | None = None,
    **settings: Any,
) -> Tensor:
    """`comp_kernels.alignment_loss` with targets found for `chunk` rows at a time, of this process alone.

    The value is still the mean over the valid rows of the group, the gradient that of the local rows, to be summed.
    """
    total = vision.new_zeros((), dtype=torch.float32)
    for rows, texts, counted in zip(vision.split(chunk), text.split(chunk), valid.split(chunk)):
        total = total + counted.sum() * alignment_loss(rows, texts, prototypes, valid=counted, **settings)
    return _mean_over_group(total, valid, group)


def _mean_over_group(total: Tensor, valid: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of the local rows -> mean over the group's valid rows, with the gradient of the local ones; 0 where none is valid."""
    count = valid.sum()
    if group is not None:
        dist.all_reduce(count, group=group)
        everywhere = total.detach().clone()
        dist.all_reduce(everywhere, group=group)
        total = total + (everywhere - total.detach())
    return total / count.clamp(min=1)


def _gather_rows(text: Tensor, valid: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, int]:
    """The rows of all processes, which may hold different numbers of them, and where this process's begin."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    count = torch.tensor([len(text)], device=text.device)
    counts = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(counts, count, group=group)
    lengths = [int(c) for c in counts]
    # validity travels as a column of the rows; all_gather needs equal shapes
    rows = F.pad(torch.cat((text, valid.to(text.dtype).unsqueeze(1)), dim=1), (0, 0, 0, max(lengths) - len(text)))
    shares = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(shares, rows, group=group)
    everything = torch.cat([share[:length] for share, length in zip(shares, lengths)])
    return everything[:, :-1], everything[:, -1] > 0, sum(lengths[:rank])
