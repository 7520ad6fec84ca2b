"""The alignment loss over tiles of prototypes: nothing of size [n, V] is needed, and what is kept of that size is budgeted.

Two passes over the prototypes, whatever the backend (README.md derives both):

    potentials   the target as 2^(text score + u2 + v2) * weight with u2, weight [n] and v2 [V], and (maximum, sum) per row
                 of the vision scores. Mode "sinkhorn" takes num_iters iterations, the others one log-sum-exp.
    loss         target and prediction of a tile side by side: its share of the loss and, as (prediction - target) @ prototypes,
                 of the gradient of vision.

Products go through torch's matmul (products.py); `steps` is the backend (cpu.py, triton_backend.py) and does what lies between.
Scores that fit the budget (`kept_columns`) stay in memory between the passes, the rest are computed again, tile by tile. All
logarithms are in bits, all potentials of the computing dtype.
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
from .features import Features
from .products import COLUMNS, Matmul, choose_products, cut

Pair = tuple[Tensor, Tensor]  # running maximum in bits and sum of 2^(entry - maximum), per row

# What is kept may take this share of what the plain version takes beside its inputs: normalised prototypes and so many matrices
# [n, V] at its peak (measured, docs/kernels/alignment_loss.md). An entry without its text score costs a product in every
# iteration, one without its vision score a single product.
PLAIN_MATRICES = 5
KEPT_SHARE = 1 / 4
MANY_ROWS = 2048  # from here on the backend's share


@dataclass(frozen=True)
class Limits:
    """How many prototypes a backend wants per tile."""

    score_elements: int  # of one [n, columns] tile, at most
    prototype_elements: int  # of one [columns, D] tile, at most
    min_cols: int
    max_cols: int
    whole_kept: bool  # whether scores that are kept are best made in one piece
    pairs: float  # elements per score that the sums of rows take while tiles add to them
    share_of_many: float  # what may be kept of many rows, as KEPT_SHARE


@dataclass(frozen=True)
class Target:
    """target_ik = 2^(text_ik + u2_i + v2_k) * weight_i."""

    u2: Tensor  # [n]; -inf: the row has none
    v2: Tensor | None  # [V]; None: zeros
    weight: Tensor | None  # [n]; None: ones


def tile_columns(num_rows: int, dim: int, num_words: int, limits: Limits) -> int:
    cols = min(limits.score_elements // max(num_rows, 1), limits.prototype_elements // max(dim, 1))
    return min(max(cols, limits.min_cols) // COLUMNS * COLUMNS, limits.max_cols, max(num_words, 1))


def kept_columns(num_rows: int, dim: int, num_words: int, tile: int, extra: int, share_of_many: float) -> tuple[int, int]:
    """(columns whose vision and text scores are kept, columns whose text scores are): whole tiles, or all. `extra` elements are
    taken by other things."""
    share = KEPT_SHARE if num_rows < MANY_ROWS else share_of_many
    budget = share * (num_words * dim + PLAIN_MATRICES * num_rows * num_words)
    if 2 * num_rows * num_words <= budget:
        return num_words, num_words
    columns = int(budget - extra - 2 * num_rows * tile) // max(num_rows, 1)  # beside the tiles of scores that are not kept
    text = num_words if columns >= num_words else max(columns, 0) // tile * tile
    return max(columns - num_words, 0) // tile * tile, text


class Scores:
    """Products of the features with all prototypes, in tiles. Vision and text scores of the first `both` columns stay in
    memory, text scores of the first `text_cols`."""

    def __init__(self, steps: ModuleType, products: Matmul, features: Features, words: int, normalize: bool) -> None:
        rows, dim = features.num_rows, products.prototypes.shape[1]
        tile = tile_columns(rows, dim, words, steps.LIMITS)
        self.steps, self.products, self.features, self.words = steps, products, features, words
        extra = products.extra_elements(tile) + int(steps.LIMITS.pairs * rows * words)
        extra += (2 * products.terms + products.gradient_terms + 1) * rows * dim  # the features, their gradients
        self.both, self.text_cols = kept_columns(rows, dim, words, tile, extra, steps.LIMITS.share_of_many)
        kept_tile = None if steps.LIMITS.whole_kept else tile
        self.tiles = cut(0, self.both, kept_tile) + cut(self.both, self.text_cols, tile) + cut(self.text_cols, words, tile)
        new = features.inverse_length.new_empty
        self.kept_both = new((2 * rows, self.both))
        self.kept_text = new((rows, self.text_cols - self.both))
        self.scratch = new((2 * rows, tile if self.both < words else 0))
        self.filled = 0  # columns whose kept scores are there
        self.scales = new(words) if normalize else None  # [V], of the prototypes

    def widths(self, tiles: list[slice]) -> list[int]:
        return [columns.stop - columns.start for columns in tiles]

    def scale_of(self, columns: slice) -> Tensor | None:
        return None if self.scales is None else self.scales[columns]

    def vision_and_text(self, columns: slice) -> tuple[Tensor, Tensor]:
        """[n, C] each."""
        rows, first = self.features.num_rows, columns.stop > self.filled
        if first and self.scales is not None:
            self.steps.inverse_norms(self.products.prototypes[columns], self.scales[columns])
        if columns.stop <= self.both or columns.start >= self.text_cols:
            kept = columns.stop <= self.both
            both = self.kept_both[:, columns] if kept else self.scratch[:, : columns.stop - columns.start]
            if first or not kept:
                self.products.scores(self.features.rows, columns, both)
            vision, text = both[:rows], both[rows:]
        else:
            vision, text = self.scratch[:rows, : columns.stop - columns.start], self._kept_text(columns)
            self.products.scores(self.features.vision, columns, vision)
            if first:
                self.products.scores(self.features.text, columns, text)
        self.filled = max(self.filled, columns.stop)
        return vision, text

    def text(self, columns: slice) -> Tensor:
        """[n, C], once vision_and_text has seen all columns."""
        if columns.stop <= self.text_cols:
            return self._kept_text(columns)
        tile = self.scratch[self.features.num_rows :, : columns.stop - columns.start]
        self.products.scores(self.features.text, columns, tile)
        return tile

    def text_tiles(self) -> list[slice]:
        """Tiles for `text`: what is kept in as few pieces as it lies in."""
        pieces = [slice(0, self.both), slice(self.both, self.text_cols)]
        return [x for x in pieces if x.stop > x.start] + [x for x in self.tiles if x.start >= self.text_cols]

    def _kept_text(self, columns: slice) -> Tensor:
        if columns.stop <= self.both:
            return self.kept_both[self.features.num_rows :, columns]
        return self.kept_text[:, columns.start - self.both : columns.stop - self.both]


def forward(call: Call, steps: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to vision [n, D] and prototypes [V, D], of the computing dtype (empty when not
    wanted), by the steps of a backend."""
    if call.prototypes.stride(-1) != 1:
        call = call._replace(prototypes=call.prototypes.contiguous())
    streamed = Stream(steps, call)
    return streamed.loss(*streamed.potentials())


class Stream:
    """One evaluation of the loss."""

    def __init__(self, steps: ModuleType, call: Call) -> None:
        self.steps, self.call, self.group = steps, call, group_by_name(call.group)
        self.num_rows = call.vision.shape[0]
        dtype = torch.promote_types(call.vision.dtype, torch.float32)
        features_dtype = call.vision.dtype if call.vision.dtype == call.text.dtype else torch.float32
        on_gpu = steps.on_gpu(call.device)
        self.products = choose_products(call.prototypes, self.num_rows, dtype, features_dtype, call.prototype_gradient, on_gpu)
        self.features = steps.prepare_features(call, self.products)
        self.scores = Scores(steps, self.products, self.features, call.prototypes.shape[0], call.normalize)
        self.like = self.features.inverse_length  # for dtype and device
        self.num_valid, self.row_weight, self.start = self._rows()
        self.text_factor, self.vision_factor = LOG2E / call.epsilon, LOG2E / call.temperature

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Valid rows of the whole group, the rows' weights in the loss [n], and u2 [n] before the first iteration: 0, -inf for
        rows that do not count."""
        num_valid, weight, start = self.steps.count_rows(self.num_rows, self.call.valid, self.like)
        if self.group is not None:
            dist.all_reduce(num_valid, group=self.group)
            weight = (start == 0) / num_valid.clamp(min=1)
        return num_valid, weight, start

    def potentials(self) -> tuple[Target, Pair]:
        """The target, and (maximum, sum) of each row of the vision scores."""
        if self.call.mode != "sinkhorn":
            v2 = self.prior_bias(self.call.prior)
            vision_pairs = self.new_pairs(first=True)
            peaks, sums = self.row_pairs(v2, vision_pairs)
            return Target(self.start - peaks, v2, sums.reciprocal()), vision_pairs.result()
        frequency = word_frequency(self.call.prior, self.like, self.scores.words)
        targets = frequency.mul_(self.num_valid)
        return self.sinkhorn_over_group(targets) if self.group is not None else self.sinkhorn(targets)

    def prior_bias(self, prior: Tensor | None) -> Tensor | None:
        """What the modes without iterations add to the text logits per word; None when it is the same for all."""
        if self.call.mode == "softmax" or prior is None:
            return None
        counts = prior.to(self.like.dtype)
        if self.call.mode == "literal":
            return word_frequency(prior, self.like, len(prior)).log2()
        strength = self.call.num_iters / self.call.prior_temperature * LOG2E
        return strength * counts.clamp(min=1) / counts.sum()

    def text_scores(self, vision_pairs=None) -> Iterator[tuple[slice, Tensor]]:
        """(columns, scores) over all words. With vision_pairs this is the first pass: every tile by itself, the prototypes'
        norms are taken and the vision scores are merged into the pairs as well."""
        if vision_pairs is None:
            for columns in self.scores.text_tiles():
                yield columns, self.scores.text(columns)
            return
        for columns in self.scores.tiles:
            vision, text = self.scores.vision_and_text(columns)
            vision_pairs.add(vision, self.vision_factor, None, self.scores.scale_of(columns), self.features.scales[0])
            yield columns, text

    def tiles(self, first: bool) -> list[slice]:
        """What text_scores goes through."""
        return self.scores.tiles if first else self.scores.text_tiles()

    def new_pairs(self, first: bool):
        return self.steps.RowPairs(self.num_rows, self.scores.widths(self.tiles(first)), self.like)

    def row_pairs(self, v2: Tensor | None, vision_pairs=None) -> Pair:
        """Sums over the vocabulary of 2^(text score + v2), [n]; vision_pairs as of text_scores."""
        pairs = self.new_pairs(first=vision_pairs is not None)
        for columns, scores in self.text_scores(vision_pairs):
            of_columns = None if v2 is None else v2[columns]
            pairs.add(scores, self.text_factor, of_columns, self.scores.scale_of(columns), self.features.scales[1])
        return pairs.result()

    def row_log_sums(self, v2: Tensor) -> Tensor:
        peaks, sums = self.row_pairs(v2)
        return peaks + sums.log2()

    def sinkhorn(self, targets: Tensor) -> tuple[Target, Pair]:
        """Iterations that read the scores once each: every tile scales its columns and returns its share of the row sums."""
        u2, v2, vision_pairs = self.start, torch.empty_like(targets), self.new_pairs(first=True)
        for iteration in range(self.call.num_iters):
            first = iteration == 0
            row_sums = None  # its memory first
            row_sums = self.steps.RowSums(u2, self.scores.widths(self.tiles(first)))
            for columns, scores in self.text_scores(vision_pairs if first else None):
                row_sums.iterate(
                    scores,
                    self.text_factor,
                    self.scores.scale_of(columns),
                    self.features.scales[1],
                    u2,
                    None if first else v2[columns],
                    targets[columns],
                    v2[columns],
                )
            u2 = row_sums.scale(u2, self.call.valid, lambda: self.row_log_sums(v2))
        return Target(u2, v2, None), vision_pairs.result()

    def sinkhorn_over_group(self, targets: Tensor) -> tuple[Target, Pair]:
        """The same with the columns summed over all processes before any row is scaled: two passes over the scores."""
        u2 = self.start
        v2, peaks, sums = (torch.empty_like(targets) for _ in range(3))
        vision_pairs = self.new_pairs(first=True)
        for iteration in range(self.call.num_iters):
            for columns, scores in self.text_scores(vision_pairs if iteration == 0 else None):
                peaks[columns], sums[columns] = self.steps.column_statistics(
                    scores, self.text_factor, u2, self.scores.scale_of(columns), self.features.scales[1]
                )
            v2 = scale(targets, merge_over_group(peaks.clone(), sums, self.group))
            u2 = self.start - self.row_log_sums(v2)
        return Target(u2, v2, None), vision_pairs.result()

    def loss_tiles(self) -> list[slice]:
        """Tiles for the last pass: narrower where score gradients take memory of their own."""
        width = self.products.gradient_cols()
        return [part for columns in self.scores.tiles for part in cut(columns.start, columns.stop, width)]

    def loss(self, target: Target, vision_pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over the group's valid rows of the cross-entropy, and the gradients of the local vision features and of the
        prototypes."""
        row_weight, tiles, dim = self.row_weight, self.loss_tiles(), self.call.prototypes.shape[1]
        gradient, prototype_gradient = self.call.gradient, self.call.prototype_gradient
        losses = self.steps.Losses(self.num_rows, self.scores.widths(tiles), self.like)
        gradients = self.like.new_empty((self.products.gradient_terms, self.num_rows, dim) if gradient else 0)
        if not tiles:
            gradients.zero_()
        grad_prototypes = self.like.new_empty((self.scores.words, dim) if prototype_gradient else 0)
        for columns in tiles:
            vision, text = self.scores.vision_and_text(columns)
            score_gradients = self.products.score_gradients(vision) if gradient or prototype_gradient else None
            losses.add(
                text,
                vision,
                score_gradients,
                text_row_scale=self.features.scales[1],
                vision_row_scale=self.features.scales[0],
                col_scale=self.scores.scale_of(columns),
                u2=target.u2,
                v2=None if target.v2 is None else target.v2[columns],
                target_weight=target.weight,
                peaks2=vision_pair[0],
                sums=vision_pair[1],
                row_weight=row_weight,
                text_factor=self.text_factor,
                vision_factor=self.vision_factor,
                grad_factor=1.0 / self.call.temperature,
            )
            if score_gradients is None:
                continue
            if gradient:
                self.products.add_gradient(score_gradients, columns, gradients, first=columns.start == 0)
            if prototype_gradient:
                self.gradient_of_prototypes(score_gradients, columns, grad_prototypes[columns])
        loss = losses.total(row_weight)
        if self.group is not None:
            dist.all_reduce(loss, group=self.group)
        if not gradient:
            return loss, self.like.new_empty(0), grad_prototypes
        return loss, self.steps.through_feature_lengths(gradients, self.features, self.call.normalize), grad_prototypes

    def gradient_of_prototypes(self, score_gradients: Tensor, columns: slice, out: Tensor) -> None:
        """out [C, D], through the vision scores; the target is a constant."""
        self.products.prototype_gradient(score_gradients, self.features.vision, out)
        scales = self.scores.scale_of(columns)
        if scales is not None:
            self.steps.through_prototype_lengths(out, self.call.prototypes[columns], scales)


def word_frequency(prior: Tensor | None, like: Tensor, num_words: int) -> Tensor:
    if prior is None:
        return like.new_full((num_words,), 1.0 / max(num_words, 1))
    counts = prior.to(like.dtype).clamp(min=1)
    return counts.div_(counts.sum())
