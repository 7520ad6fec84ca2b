"""The definition of the alignment loss in plain PyTorch; keeps the [n, V] score matrices the fused versions avoid."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..sinkhorn.reference import sinkhorn

MODES = ("sinkhorn", "literal", "released", "softmax")
NORM_FLOOR = 1e-12  # rows shorter than this count as zero; torch.nn.functional.normalize divides by it
# For rows whose squares are beyond the range: sums of squares are within it then, and no row falls below the floor.
SCALE_DOWN = {torch.float32: 2.0**-80, torch.float64: 2.0**-540}


def unit_rows(x: Tensor) -> Tensor:
    """[n, D] with rows of length one.

    A row shorter than NORM_FLOOR has no direction: it becomes zero, its cosines are 0, and it receives no gradient. That of the
    division would be up to 1e12 times as large as the others' and leave nothing of them after clipping.
    """
    x = within_squares(x)
    length = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    return torch.nn.functional.normalize(torch.where(length <= NORM_FLOOR, 0.0, x), dim=-1)  # NaN stays NaN


def within_squares(x: Tensor) -> Tensor:
    """x [n, D] with rows whose squares are beyond the range of its dtype scaled down; their direction is what it was."""
    too_long = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) == torch.inf
    return torch.where(too_long, x * SCALE_DOWN[x.dtype], x)


def target_distribution(
    text_scores: Tensor,
    prior: Tensor | None,
    *,
    mode: str,
    epsilon: float,
    num_iters: int,
    prior_temperature: float,
    valid: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The target p_t [n, V] (rows sum to one) from text scores c_t [n, V] and word counts N = prior [V].

    Source: CoMP, arXiv 2503.18931v2, Eq. 9. Its text, its formula and its released code disagree, hence the modes:

        "softmax"   softmax(c_t / epsilon): the paper's "w/o Sinkhorn-Knopp" row
        "literal"   softmax(c_t / epsilon + log w),                     w = max(N, 1) / sum max(N, 1): Eq. 9 as printed
        "released"  softmax(c_t / epsilon + num_iters * r / prior_temperature), r = max(N, 1) / sum N: closed form of the code
        "sinkhorn"  the transport plan with rows summing to 1 and columns to n w over the valid rows of the whole group
    """
    logits = text_scores / epsilon
    if mode == "softmax":
        return logits.softmax(-1)
    num_words = text_scores.shape[-1]
    counts = logits.new_ones(num_words) if prior is None else prior.to(logits.dtype)
    floored = counts.clamp(min=1)
    frequency = floored / floored.sum()
    if mode == "literal":
        return (logits + frequency.log()).softmax(-1)
    if mode == "released":
        return (logits + num_iters * (floored / counts.sum()) / prior_temperature).softmax(-1)
    if mode == "sinkhorn":
        rows = valid.to(logits.dtype)
        num_valid = rows.sum()
        if group is not None:
            dist.all_reduce(num_valid, group=group)
        plan, _, _ = sinkhorn(
            text_scores,
            epsilon=epsilon,
            num_iters=num_iters,
            row_marginals=rows,
            col_marginals=num_valid * frequency,
            group=group,
            return_potentials=True,
        )
        return plan
    raise ValueError(f"mode must be one of {MODES}, got {mode!r}")


def alignment_loss(
    vision: Tensor,
    text: Tensor,
    prototypes: Tensor,
    *,
    prior: Tensor | None = None,
    mode: str = "sinkhorn",
    epsilon: float = 0.005,
    temperature: float = 0.005,
    num_iters: int = 3,
    prior_temperature: float = 0.05,
    valid: Tensor | None = None,
    normalize: bool = True,
    prototype_gradient: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy between the text's word distribution (the target) and the vision feature's; shapes as
    `comp_kernels.alignment_loss`.

        c_v = vision prototypes^T     c_t = text prototypes^T                     cosines when normalize is true
        loss = mean over valid rows i of  - sum_k p_t[i, k] log softmax_k(c_v[i, k] / temperature)

    Arithmetic in float32 (float64 for float64 inputs). No gradient reaches text or the target, nor prototypes unless
    prototype_gradient lets it pass through c_v, and none a row without a direction (`unit_rows`).
    """
    compute = torch.promote_types(vision.dtype, torch.float32)
    text, vision = text.detach().to(compute), vision.to(compute)
    prototypes = (prototypes if prototype_gradient else prototypes.detach()).to(compute)
    valid = vision.new_ones(vision.shape[0], dtype=torch.bool) if valid is None else valid
    # Rows that do not count are cut off before any arithmetic: a NaN there reaches neither the loss nor the gradient.
    vision = torch.where(valid.unsqueeze(-1), vision, 0.0)
    text = torch.where(valid.unsqueeze(-1), text, 0.0)
    if normalize:
        vision, text, prototypes = (unit_rows(x) for x in (vision, text, prototypes))

    with torch.no_grad():
        target = target_distribution(
            text @ prototypes.detach().T,
            prior,
            mode=mode,
            epsilon=epsilon,
            num_iters=num_iters,
            prior_temperature=prior_temperature,
            valid=valid,
            group=group,
        )
    log_prediction = (vision @ prototypes.T / temperature).log_softmax(-1)
    per_row = -(target * log_prediction).sum(-1)
    return mean_over_group(torch.where(valid, per_row, 0.0).sum(), valid, group)


def mean_over_group(total: Tensor, valid: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of the local rows -> mean over the group's valid rows, with the gradient of the local ones; 0 where none is valid."""
    count = valid.sum()
    if group is not None:
        dist.all_reduce(count, group=group)
        everywhere = total.detach().clone()
        dist.all_reduce(everywhere, group=group)
        total = total + (everywhere - total.detach())
    return total / count.clamp(min=1)
