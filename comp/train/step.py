"""One optimiser step: forward passes of this process, losses normalised over all processes, gradients, clipping, update.

    loss = sum of next-token losses / learned tokens of the whole step  +  weight * alignment loss of the whole step

(with `token_loss` "sample": sum of the samples' mean next-token losses / samples with a learned token of the whole step),

so neither the number of processes nor the cut into forward passes changes what is learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config import StageConfig
from ..data.batch import BadSampleError, Batch
from ..data.loader import StepData
from ..data.packing import empty_batch
from ..model.multimodal import CoMP, CoMPOutput
from ..parallel import World, loss_scale, sum_gradients, total_norm


class NonFiniteLossError(RuntimeError):
    """Loss or gradient is not finite. Raised before the update: the parameters are still those of the last good step."""


@dataclass(kw_only=True, slots=True)
class StepTotals:
    """Counts over all processes, known before the first forward pass."""

    tokens: int  # learned tokens
    samples: int
    images: int
    text_tokens: int
    visual_tokens: int
    text_slots: int  # text tokens as the decoder computes them, padding included
    flops: float  # operations of the step, `comp.train.work`
    skipped: int
    notes: int  # that some process has not said yet
    stop: bool  # some process was asked to stop
    num_forwards: int  # the most forward passes any process needs; all run as many
    aligned_rows: int  # samples in the alignment loss
    learned_rows: int  # samples with a learned token

    @classmethod
    def gather(
        cls, data: StepData, world: World, *, padded: bool = False, flops: float = 0.0, notes: int = 0, stop: bool
    ) -> StepTotals:
        """Add up the shares of all processes. Raises BadSampleError where they shared out the samples differently."""
        counts = dict(
            tokens=sum(batch.num_learned_tokens() for batch in data.batches),
            samples=data.num_samples,
            images=data.num_images,
            text_tokens=data.num_text_tokens,
            visual_tokens=data.num_visual_tokens,
            text_slots=sum(batch.input_ids.numel() for batch in data.batches) if padded else data.num_text_tokens,
            flops=flops,
            skipped=len(data.skipped),
            notes=notes,
            aligned_rows=sum(batch.num_aligned_rows() for batch in data.batches),
            learned_rows=sum(batch.num_learned_rows() for batch in data.batches),
            stop=stop,
        )
        totals = dict(zip(counts, (int(value) for value in world.sum(list(counts.values())))))
        num_forwards, most, least = (int(value) for value in world.max([len(data.batches), data.shares, -data.shares]))
        if most != -least:
            raise BadSampleError(
                f"step {data.step}: the processes share out its samples differently, so some can read what others cannot; "
                "look at the storage of the images, or set balance=false"
            )
        stops = totals.pop("stop")
        return cls(**totals, stop=stops > 0, num_forwards=num_forwards)


@dataclass(kw_only=True, slots=True)
class StepLosses:
    """Means over the whole step, and gradient norms per part before clipping; "total" is the norm that is clipped."""

    loss: float
    token_loss: float
    alignment_loss: float | None
    grad_norm: dict[str, float]


def train_step(
    model: CoMP,
    optimizer: torch.optim.Optimizer,
    data: StepData,
    totals: StepTotals,
    stage: StageConfig,
    world: World,
    *,
    pad_id: int,
    bf16: bool,
) -> StepLosses:
    """Learn from one step's samples. Raises NonFiniteLossError before anything is updated."""
    optimizer.zero_grad(set_to_none=True)
    token_loss, alignment = accumulate_gradients(model, data, totals, stage, world, pad_id=pad_id, bf16=bf16)
    parts = {part: [p for p in named.values() if p.requires_grad] for part, named in model.named_parts().items()}
    sum_gradients([p for parameters in parts.values() for p in parameters], world)
    gradients = {part: [p.grad for p in parameters if p.grad is not None] for part, parameters in parts.items()}
    norms = {part: total_norm(share) for part, share in gradients.items() if share}
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    losses = _to_host(token_loss, alignment, norms, total, stage, world)
    _check_finite(losses, data, world)
    scale = stage.optim.max_grad_norm / (losses.grad_norm["total"] + 1e-6)
    if scale < 1:
        torch._foreach_mul_([gradient for share in gradients.values() for gradient in share], scale)
    optimizer.step()
    return losses


def accumulate_gradients(
    model: CoMP, data: StepData, totals: StepTotals, stage: StageConfig, world: World, *, pad_id: int, bf16: bool
) -> tuple[Tensor, Tensor | None]:
    """Forward and backward over this process's batches; returns its share of the mean token loss, and the alignment loss."""
    if totals.tokens == 0:
        raise ValueError(f"no sample of this step can be learned from: {data.skipped[:3]}")
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=bf16)
    batches = [batch.to(world.device) for batch in _padded(data.batches, totals.num_forwards, pad_id)]
    settings, step_text = stage.alignment, None
    if settings is not None:
        with autocast:
            step_text = model.step_text(batches)
    token_loss = torch.zeros((), dtype=torch.float64, device=world.device)
    alignment = torch.zeros_like(token_loss)
    scale = loss_scale(model, world)
    per_sample = stage.token_loss == "sample"
    parts = totals.learned_rows if per_sample else totals.tokens
    for batch in batches:
        with autocast:
            output: CoMPOutput = model(batch, alignment=settings, group=world.group, step_text=step_text, per_sample=per_sample)
        loss = output.token_loss_sum / parts
        token_loss += loss.detach()
        if settings is not None and output.alignment_loss is not None:
            alignment += output.alignment_loss.detach()
            loss = loss + settings.weight * output.alignment_loss
        if step_text is not None:
            step_text = replace(step_text, begin=step_text.begin + len(batch.input_ids))
        if loss.requires_grad:  # not so for text alone while only vision parts train
            (loss * scale).backward()
    if settings is None:
        return token_loss, None
    # A pass scores images of other passes 0 for every choice: each such row costs log(choices) whatever its target is. Each
    # of the n rows is in one pass and outside M - 1, so all M passes sum to (sum of their losses + n (M - 1) log(choices)) / n.
    contrastive = settings.mode == "contrastive"
    choices = totals.aligned_rows if contrastive else len(model.prototypes(settings.prototype_source))
    constant = math.log(choices) if totals.aligned_rows else 0.0
    return token_loss, alignment - (len(batches) - 1) * constant


def _padded(batches: Sequence[Batch], num_forwards: int, pad_id: int) -> list[Batch]:
    """As many batches as the busiest process has: forward passes contain collectives that all must join."""
    missing = num_forwards - len(batches)
    patch_features = batches[0].pixel_values.shape[1] if batches else 0
    return [*batches, *(empty_batch(pad_id=pad_id, patch_features=patch_features) for _ in range(missing))]


def _to_host(
    token_loss: Tensor, alignment: Tensor | None, norms: dict[str, Tensor], total: Tensor, stage: StageConfig, world: World
) -> StepLosses:
    """The one read-back of a step."""
    device_values = [token_loss, token_loss.new_zeros(()) if alignment is None else alignment, *norms.values(), total]
    own_token_loss, alignment_loss, *norm_values = torch.stack([v.double() for v in device_values]).tolist()
    mean_token_loss = world.sum([own_token_loss])[0]
    weighted = 0.0 if stage.alignment is None else stage.alignment.weight * alignment_loss
    return StepLosses(
        loss=mean_token_loss + weighted,
        token_loss=mean_token_loss,
        alignment_loss=None if stage.alignment is None else alignment_loss,
        grad_norm=dict(zip((*norms, "total"), norm_values)),
    )


def _check_finite(losses: StepLosses, data: StepData, world: World) -> None:
    """Loss and norm are the same everywhere, so all processes stop together."""
    if not (math.isfinite(losses.loss) and math.isfinite(losses.grad_norm["total"])):
        names = [name for share in world.gather([n for batch in data.batches for n in batch.names]) for name in share]
        raise NonFiniteLossError(
            f"loss {losses.loss} (next token {losses.token_loss}, alignment {losses.alignment_loss}), gradient norms "
            f"{losses.grad_norm}; nothing was updated. Samples of this step: {', '.join(names)}"
        )


def seed_step(seed: int, stage: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step, so that a resumed run draws the same numbers without stored state."""
    torch.manual_seed(int(np.random.SeedSequence([seed, stage, step, rank]).generate_state(1, np.uint64)[0] >> 1))
