"""The alignment loss over tiles of prototypes: nothing of size [n, V] is needed, and what is kept of that size is budgeted.

Two passes over the prototypes, whatever the backend (README.md derives both):

    potentials   the target as 2^(text score + u2 + v2) * weight with u2, weight [n] and v2 [V], and (maximum, sum) per row
                 of the vision scores. Mode "sinkhorn" takes num_iters iterations, the others one log-sum-exp.
    loss         target and prediction of a tile side by side: its share of the loss and, as (prediction - target) @ prototypes,
                 of the gradient of vision.

Text scores that fit `TEXT_SHARE` of the inputs' size are kept between the passes, the rest are computed again, tile by tile;
vision scores, if both fit `BOTH_SHARE`. All logarithms are in bits, all potentials of the computing dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from ..._units import LOG2E
from .._log_domain.over_group import group_by_name, merge_over_group, scale
from .call import Call
from .reference import NORM_FLOOR

Pair = tuple[Tensor, Tensor]  # running maximum in bits and sum of 2^(entry - maximum), per row

# Bytes of [n, V] scores kept between the passes, as shares of the bytes of (n + V) * D inputs in the computing dtype. Without
# its text score an entry costs a product in every iteration, without its vision score a single one.
TEXT_SHARE = 1.0
BOTH_SHARE = 0.3

COLUMNS = 16  # tiles and rows of scores begin at multiples of it: 64 bytes in float32, whatever the batch


@dataclass(frozen=True)
class TileLimits:
    """How many prototypes a backend wants per tile."""

    score_elements: int  # of one [n, columns] tile, at most
    prototype_elements: int  # of one [columns, D] tile, at most
    min_cols: int
    max_cols: int


@dataclass(frozen=True)
class Settings:
    """What the target is; the arguments of comp_kernels.alignment_loss."""

    mode: str
    epsilon: float
    temperature: float
    num_iters: int
    prior_temperature: float
    normalize: bool
    group: dist.ProcessGroup | None


@dataclass(frozen=True)
class Target:
    """target_ik = 2^(text_ik + u2_i + v2_k) * weight_i."""

    u2: Tensor  # [n]; -inf: the row has none
    v2: Tensor | None  # [V]; None: zeros
    weight: Tensor  # [n]


@dataclass
class Scores:
    """Products of one feature matrix [n, D] with all prototypes; the first `kept.shape[1]` columns stay in memory."""

    steps: ModuleType
    features: Tensor
    kept: Tensor  # [n, columns kept]
    scratch: Tensor  # [n, tile columns]
    filled: int = 0

    def tile(self, columns: slice, prototypes: Tensor) -> Tensor:
        """[n, columns]; computed unless it was kept before."""
        if columns.stop > self.kept.shape[1]:
            tile = self.scratch[:, : columns.stop - columns.start]
            self.steps.products(self.features, prototypes, tile)
            return tile
        tile = self.kept[:, columns]
        if columns.stop > self.filled:
            self.steps.products(self.features, prototypes, tile)
            self.filled = columns.stop
        return tile


class Prototypes:
    """The [V, D] matrix in tiles, and one over the norm of every row once it was seen."""

    def __init__(self, steps: ModuleType, matrix: Tensor, dtype: torch.dtype, tile_cols: int, normalize: bool) -> None:
        self.steps, self.matrix, self.tile_cols = steps, matrix, tile_cols
        self.scales = matrix.new_empty(matrix.shape[0], dtype=dtype) if normalize else None  # [V]
        # One tile in the computing dtype, where the backend's products need it; never a copy of the matrix.
        wide = matrix.dtype == dtype or not steps.NEEDS_WIDE_PROTOTYPES
        self.scratch = None if wide else matrix.new_empty((tile_cols, matrix.shape[1]), dtype=dtype)

    def tiles(self, begin: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """(columns, rows of the matrix) from `begin`, a multiple of the tile, on."""
        for start in range(begin, self.matrix.shape[0], self.tile_cols):
            columns = slice(start, min(start + self.tile_cols, self.matrix.shape[0]))
            rows = self.matrix[columns]
            yield columns, rows if self.scratch is None else self.scratch[: rows.shape[0]].copy_(rows)

    def measure(self, columns: slice, rows: Tensor) -> None:
        if self.scales is not None:
            self.steps.inverse_norms(rows, NORM_FLOOR, self.scales[columns])

    def scale_of(self, columns: slice) -> Tensor | None:
        return None if self.scales is None else self.scales[columns]


def tile_columns(num_rows: int, dim: int, num_words: int, limits: TileLimits) -> int:
    """Prototypes per tile: a multiple of COLUMNS, or all of them."""
    cols = min(limits.score_elements // max(num_rows, 1), limits.prototype_elements // max(dim, 1))
    cols = min(max(cols, limits.min_cols), limits.max_cols) // COLUMNS * COLUMNS
    return min(cols, max(num_words, 1))


def new_scores(like: Tensor, rows: int, cols: int) -> Tensor:
    """Memory for scores [rows, cols], each row from a multiple of COLUMNS on."""
    return like.new_empty((rows, -(-cols // COLUMNS) * COLUMNS))[:, :cols]


def forward(call: Call, steps: ModuleType) -> tuple[Tensor, Tensor]:
    """Loss and gradient of vision (empty when not wanted), by the steps of a backend."""
    settings = Settings(*call[5:11], group_by_name(call.group))
    prototypes = call.prototypes if call.prototypes.stride(-1) == 1 else call.prototypes.contiguous()
    features = call.vision.contiguous(), call.text.contiguous()
    with torch.autocast(call.device.type, enabled=False):
        return loss_and_gradient(steps, *features, prototypes, call.prior, call.valid, settings, gradient=call.gradient)


def loss_and_gradient(
    steps: ModuleType,
    vision: Tensor,
    text: Tensor,
    prototypes: Tensor,
    prior: Tensor | None,
    valid: Tensor | None,
    settings: Settings,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """vision, text [n, D] contiguous, of the computing dtype, rows normalised where they should be; prototypes [V, D] as they
    are. `steps` is the backend (see cpu.py). Returns the loss and its gradient with respect to vision [n, D] (empty when
    not wanted)."""
    streamed = Stream(steps, vision, text, prototypes, valid, settings)
    return streamed.loss(*streamed.potentials(prior), gradient)


class Stream:
    """One evaluation of the loss."""

    def __init__(self, steps, vision, text, prototypes, valid, settings: Settings) -> None:
        (rows, dim), words = vision.shape, prototypes.shape[0]
        cols = tile_columns(rows, dim, words, steps.TILE_LIMITS)
        text_budget, budget = (
            int(share * (rows + words) * dim) // max(rows, 1) for share in (TEXT_SHARE, BOTH_SHARE)
        )  # columns
        kept_text = words if text_budget >= words else text_budget // cols * cols
        kept_vision = words if budget - kept_text >= words else 0
        self.steps, self.settings = steps, settings
        self.prototypes = Prototypes(steps, prototypes, vision.dtype, cols, settings.normalize)
        scratch_cols = cols if kept_text < words else 0
        self.text = Scores(steps, text, new_scores(text, rows, kept_text), new_scores(text, rows, scratch_cols))
        self.vision = Scores(steps, vision, new_scores(text, rows, kept_vision), new_scores(text, rows, cols))
        self.valid = vision.new_ones(rows, dtype=torch.bool) if valid is None else valid
        self.num_valid = self.valid.sum()
        if settings.group is not None:
            dist.all_reduce(self.num_valid, group=settings.group)
        self.text_factor, self.vision_factor = LOG2E / settings.epsilon, LOG2E / settings.temperature

    def potentials(self, prior: Tensor | None) -> tuple[Target, Pair]:
        """The target, and (maximum, sum) of each row of the vision scores."""
        if self.settings.mode != "sinkhorn":
            v2 = self.prior_bias(prior)
            vision_pair = self._empty_pair()
            peaks, sums = self.row_sums(v2, vision_pair)
            return Target(torch.where(self.valid, -peaks, -torch.inf), v2, sums.reciprocal()), vision_pair
        frequency = word_frequency(prior, self.text.features, self.prototypes.matrix.shape[0])
        targets = self.num_valid.to(frequency.dtype) * frequency
        return self.sinkhorn_over_group(targets) if self.settings.group is not None else self.sinkhorn(targets)

    def prior_bias(self, prior: Tensor | None) -> Tensor | None:
        """What the modes without iterations add to the text logits per word; None when it is the same for all."""
        if self.settings.mode == "softmax" or prior is None:
            return None
        counts = prior.to(self.text.features.dtype)
        if self.settings.mode == "literal":
            return word_frequency(prior, self.text.features, len(prior)).log2()
        strength = self.settings.num_iters / self.settings.prior_temperature * LOG2E
        return strength * counts.clamp(min=1) / counts.sum()

    def text_scores(self, vision_pair: Pair | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(columns, scores) over all words: the kept ones at once, the others tile by tile.

        With vision_pair this is the first pass: every tile by itself, the prototypes' norms are taken and the vision scores
        are merged into the pair as well.
        """
        first = vision_pair is not None
        if not first and self.text.kept.shape[1]:
            yield slice(0, self.text.kept.shape[1]), self.text.kept
        for columns, rows in self.prototypes.tiles(begin=0 if first else self.text.kept.shape[1]):
            if first:
                self.prototypes.measure(columns, rows)
                self._update_rows(self.vision.tile(columns, rows), columns, self.vision_factor, vision_pair)
            yield columns, self.text.tile(columns, rows)

    def row_sums(self, v2: Tensor | None, vision_pair: Pair | None = None) -> Pair:
        """Sums over the vocabulary of 2^(text score + v2), [n]."""
        pair = self._empty_pair()
        for columns, scores in self.text_scores(vision_pair):
            self._update_rows(scores, columns, self.text_factor, pair, None if v2 is None else v2[columns])
        return pair

    def sinkhorn(self, targets: Tensor) -> tuple[Target, Pair]:
        """Iterations that read the scores once each: every tile scales its columns and returns its share of the row sums."""
        u2 = torch.where(self.valid, 0.0, -torch.inf).to(targets.dtype)
        v2 = torch.empty_like(targets)
        vision_pair = self._empty_pair()
        for iteration in range(self.settings.num_iters):
            row_sums = self.steps.RowSums(u2)
            for columns, scores in self.text_scores(vision_pair if iteration == 0 else None):
                self.steps.iterate(
                    scores,
                    self.text_factor,
                    self.prototypes.scale_of(columns),
                    u2,
                    None if iteration == 0 else v2[columns],
                    targets[columns],
                    v2[columns],
                    row_sums,
                )
            u2 = self.steps.scale_rows(u2, row_sums, lambda: _log_sum(self.row_sums(v2)))
        return Target(u2, v2, torch.ones_like(u2)), vision_pair

    def sinkhorn_over_group(self, targets: Tensor) -> tuple[Target, Pair]:
        """The same with the columns summed over all processes before any row is scaled: two passes over the scores."""
        u2 = torch.where(self.valid, 0.0, -torch.inf).to(targets.dtype)
        v2, peaks, sums = (torch.empty_like(targets) for _ in range(3))
        vision_pair = self._empty_pair()
        for iteration in range(self.settings.num_iters):
            for columns, scores in self.text_scores(vision_pair if iteration == 0 else None):
                peaks[columns], sums[columns] = self.steps.column_statistics(
                    scores, self.text_factor, u2, self.prototypes.scale_of(columns)
                )
            v2 = scale(targets, merge_over_group(peaks.clone(), sums, self.settings.group))
            u2 = torch.where(self.valid, -_log_sum(self.row_sums(v2)), -torch.inf)
        return Target(u2, v2, torch.ones_like(u2)), vision_pair

    def loss(self, target: Target, vision_pair: Pair, gradient: bool) -> tuple[Tensor, Tensor]:
        """Mean over the group's valid rows of the cross-entropy, and the gradient of the local vision features."""
        features = self.vision.features
        row_weight = self.valid.to(features.dtype) / self.num_valid.clamp(min=1)
        grad_vision = torch.zeros_like(features) if gradient else features.new_empty(0)
        row_loss2 = torch.zeros(features.shape[0], dtype=torch.float64, device=features.device)
        for columns, rows in self.prototypes.tiles():
            text, vision = self.text.tile(columns, rows), self.vision.tile(columns, rows)
            self.steps.loss_tile(
                text,
                vision,
                col_scale=self.prototypes.scale_of(columns),
                u2=target.u2,
                v2=None if target.v2 is None else target.v2[columns],
                target_weight=target.weight,
                peaks2=vision_pair[0],
                sums=vision_pair[1],
                row_weight=row_weight,
                row_loss2=row_loss2,
                text_factor=self.text_factor,
                vision_factor=self.vision_factor,
                grad_factor=1.0 / self.settings.temperature,
                gradient=gradient,
            )
            if gradient:
                self.steps.add_products(vision, rows, grad_vision)
        loss = (row_loss2 * row_weight.double()).sum() / LOG2E
        if self.settings.group is not None:
            dist.all_reduce(loss, group=self.settings.group)
        return loss.to(features.dtype), grad_vision

    def _empty_pair(self) -> Pair:
        peaks = self.text.features.new_full(self.valid.shape, -torch.inf)
        return peaks, torch.zeros_like(peaks)

    def _update_rows(self, scores: Tensor, columns: slice, factor: float, pair: Pair, v2: Tensor | None = None) -> None:
        self.steps.update_row_statistics(scores, factor, *pair, v2, self.prototypes.scale_of(columns))


def _log_sum(pair: Pair) -> Tensor:
    peaks, sums = pair
    return peaks + sums.log2()


def word_frequency(prior: Tensor | None, like: Tensor, num_words: int) -> Tensor:
    counts = like.new_ones(num_words) if prior is None else prior.to(like.dtype).clamp(min=1)
    return counts / counts.sum()
