"""From hidden states to losses: the next-token loss (CoMP, arXiv 2503.18931v2, Eq. 6), the pooling of features (Eq. 7), and
the contrastive loss that Table 5b sets against the alignment loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from comp_kernels import alignment_loss
from comp_kernels.ops.alignment_loss.reference import mean_over_group, unit_rows

from ..data.batch import IGNORED
from .row_sizes import slack_rows, with_slack

LOGITS_AT_ONCE = 2**24
"""Elements of the largest [tokens, vocabulary] tensor that is made at a time: 64 MiB in float32."""


@dataclass(frozen=True)
class Learned:
    """What of a batch is learned: n tokens, each by the token before it."""

    predictors: Tensor
    """[T] bool over the tokens of all rows without padding: those that predict a learned one."""
    targets: Tensor
    """[n] int64 the learned tokens, in the same order."""
    shares: Tensor | None = None
    """[n] float32 what each loss counts; None: all 1."""

    @classmethod
    def of(cls, labels: Tensor, mask: Tensor, *, per_sample: bool = False) -> Learned:
        """labels:  [B, L] int64, not shifted: position i predicts labels[:, i + 1]. IGNORED is not learned.
        mask:       [B, L] bool, True on real tokens, which come first in every row.
        per_sample: let the losses of a row count 1/T for its T learned positions (Eq. 6).
        """
        learned = labels[:, 1:] != IGNORED
        lengths = learned.sum(1, keepdim=True)
        shares = (1 / lengths.clamp(min=1)).expand_as(learned)[learned] if per_sample else None
        return cls(F.pad(learned, (0, 1))[mask.bool()], labels[:, 1:][learned], shares)


@dataclass(frozen=True)
class Head:
    """How a language model makes logits of hidden states."""

    logits: Callable[[Tensor], Tensor]
    """[n, D] -> [n, vocabulary]."""
    vocabulary: int
    linear: nn.Linear | None = None
    """The layer that does so alone, where there is one: the loss is then computed with it in one piece."""


def next_token_loss(predictors: Tensor, learned: Learned, head: Head, logits_at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Sum of -log p(target | what precedes it), times the share of each: a float32 scalar.

    predictors:  [n, D] last hidden states of the tokens before the targets.
    Logits are made in chunks of at most `logits_at_once` elements. With a linear head their gradients are made with them and no
    logits are kept: by Liger's kernels on a GPU where they are installed, else by `LinearCrossEntropy`. With any other
    head chunks are recomputed in the backward pass where there is more than one. Without learned positions the loss is 0, still
    attached to the graph of `predictors`.
    """
    targets, shares = learned.targets, learned.shares
    if slack := slack_rows(len(targets), predictors.device):
        shares = with_slack(predictors.new_ones(len(targets), dtype=torch.float32) if shares is None else shares, slack)
        predictors, targets = with_slack(predictors, slack), with_slack(targets, slack)
    chunk = max(1, logits_at_once // head.vocabulary)
    if head.linear is not None:
        return _linear_loss(predictors, head.linear, targets, shares, chunk)

    def summed(rows: Tensor, wanted: Tensor, share: Tensor | None) -> Tensor:
        if share is None:
            return F.cross_entropy(head.logits(rows).float(), wanted, reduction="sum")
        return (F.cross_entropy(head.logits(rows).float(), wanted, reduction="none") * share).sum()

    if len(targets) <= chunk:
        # also reached without any learned position: the empty sum keeps the graph, on every rank the same one
        return summed(predictors, targets, shares)
    share_chunks = itertools.repeat(None) if shares is None else shares.split(chunk)
    parts = [
        checkpoint(summed, rows, wanted, share, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted, share in zip(predictors.split(chunk), targets.split(chunk), share_chunks)
    ]
    return torch.stack(parts).sum()


def _linear_loss(rows: Tensor, head: nn.Linear, targets: Tensor, shares: Tensor | None, chunk: int) -> Tensor:
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    liger = liger_loss() if rows.is_cuda and shares is None and len(targets) else None
    if liger is not None:
        return liger(rows, weight, targets, bias=bias, reduction="sum", accum_dtype=torch.float32).float()
    return LinearCrossEntropy.apply(rows, weight, bias, targets, shares, chunk)


@cache
def liger_loss() -> Callable[..., Tensor] | None:
    """Liger's fused linear cross-entropy, None where the package `liger-kernel` is not installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy


def _scaled(kept: Tensor, grad: Tensor) -> Tensor:
    """kept * grad, in a backward pass: in the memory of `kept` where the graph is not retained for another pass. A second
    matrix as large as the vocabulary would be the peak of a step."""
    is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
    return kept.mul_(grad) if is_last else kept * grad


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i share_i * cross_entropy(rows_i @ weight.T + bias, target_i), its gradients made chunk by chunk in the forward pass.

    The head is multiplied three times instead of the four of a recomputed chunk, and one chunk of logits is all that is ever
    there. rows [n, D], weight [V, D], bias [V] or None, targets [n], shares [n] or None; a float32 scalar. The gradient of
    the weight is summed in float32.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, targets, shares, chunk):
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        loss = rows.new_zeros((), dtype=torch.float32)
        grad_rows = torch.empty_like(rows) if wants_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for begin in range(0, len(rows), chunk):
            part = slice(begin, begin + chunk)
            logits = F.linear(rows[part], weight, bias).float()
            wanted = targets[part].unsqueeze(1)
            logits.sub_(logits.amax(1, keepdim=True))
            at_target = logits.gather(1, wanted)
            total = logits.exp_().sum(1, keepdim=True)
            losses = total.log() - at_target
            share = torch.ones_like(losses) if shares is None else shares[part].unsqueeze(1)
            loss += (losses * share).sum()
            if grad_rows is None and grad_weight is None and grad_bias is None:
                continue
            grads = logits.mul_(share / total)  # the same memory: softmax, minus one at the target
            grads.scatter_add_(1, wanted, -share)
            grads_low = grads.to(rows.dtype)
            if grad_rows is not None:
                torch.mm(grads_low, weight, out=grad_rows[part])
            if grad_weight is not None:
                if rows.dtype == torch.float32:
                    grad_weight.addmm_(grads_low.T, rows[part])
                else:
                    grad_weight += grads_low.T @ rows[part]
            if grad_bias is not None:
                grad_bias += grads.sum(0)
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if rows is None else rows * grad.to(rows.dtype),
            None if weight is None else _scaled(weight, grad).to(weight_dtype),
            None if bias is None else (bias * grad).to(bias_dtype),
            None,
            None,
            None,
        )


def mean_by_segment(x: Tensor, lengths: list[int] | Tensor) -> Tensor:
    """Mean of consecutive rows: x [sum(lengths), D] -> [len(lengths), D] float32; zeros where a length is 0."""
    counts = torch.as_tensor(lengths, device=x.device)
    sums = torch.segment_reduce(x.float(), "sum", lengths=counts, axis=0)  # deterministic, unlike index_add on a GPU
    return sums / counts.clamp(min=1).unsqueeze(1)


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
    return mean_over_group(total, valid, group)


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
    return mean_over_group(total, valid, group)


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
