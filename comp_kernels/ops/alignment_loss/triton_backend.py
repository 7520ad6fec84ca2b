"""The steps of alignment_loss between its products, in Triton: few launches over large pieces. Nothing waits for the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._triton import alignment, architecture, cdiv, launch, next_power_of_2, unavailable_reason
from ..._units import LOG2E
from . import streaming
from .call import Call
from .features import Features
from .products import Matmul
from .reference import NORM_FLOOR, SCALE_DOWN
from .streaming import Limits, Pair

__all__ = [
    "LIMITS",
    "Losses",
    "RowPairs",
    "RowSums",
    "column_statistics",
    "count_rows",
    "declines",
    "forward",
    "inverse_norms",
    "on_gpu",
    "prepare_features",
    "through_feature_lengths",
    "through_prototype_lengths",
    "unavailable_reason",
]

# Scores that are not kept stay in the second level cache of a large GPU; what is kept is filled in one piece.
LIMITS = Limits(
    score_elements=1 << 23,
    prototype_elements=1 << 26,
    min_cols=512,
    max_cols=32768,
    whole_kept=True,
    pairs=2 / 32,
    share_of_many=1 / 8,
)

STRIPE = 2048  # columns per program of the kernels that go along rows
COLUMN_TILE = dict(BN=64, BK=32)  # enough programs for a large GPU in tiles of few columns; one tile for batches of any size
ROW_TILE = dict(BN=16, BK=128)
LOSS_TILE = dict(BN=8, BK=128)  # 16 rows spill on gfx942
DOWN = SCALE_DOWN[torch.float32]


def declines(call: Call) -> str | None:
    return "the Triton kernels have no float64" if call.vision.dtype == torch.float64 else None


def on_gpu(device: torch.device) -> bool:
    """Whether the steps run on a GPU, or go where one is recorded or emulated with tensors on the CPU."""
    return device.type != "cpu" or architecture(device) != "interpreter"


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradients of vision and of prototypes."""
    return streaming.forward(call, steps=sys.modules[__name__])


def channels(dim: int) -> int:
    """Channels that a program takes at a time."""
    return min(max(next_power_of_2(dim), 16), 1024)


def as_bytes(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.contiguous().view(torch.uint8)


def prepare_features(call: Call, products: Matmul) -> Features:
    from .triton_kernels import features_kernel

    vision, text, valid = call.vision, call.text, call.valid
    rows, dim = vision.shape
    stored = vision.new_empty((2 * rows, products.terms * dim), dtype=products.row_dtype)
    scale = vision.new_empty(2 * rows, dtype=torch.float32) if products.raw else None
    inverse = vision.new_empty(2 * rows, dtype=torch.float32)
    vision, text = (x if x.stride(-1) == 1 else x.contiguous() for x in (vision, text))
    launch(
        features_kernel,
        (rows, 2),
        vision, text, as_bytes(valid), stored, scale, inverse,
        rows, dim, vision.stride(0), text.stride(0), NORM_FLOOR, DOWN,
        HAS_VALID=valid is not None,
        NORMALIZE=call.normalize,
        RAW=products.raw,
        TERMS=products.terms,
        BD=channels(dim),
    )  # fmt: skip
    return Features(stored, scale, inverse)


def count_rows(rows: int, valid: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(number of valid rows, their weights in the mean [n], 0 for each of them and -inf for the others [n])."""
    from .triton_kernels import count_rows_kernel

    count, weight, start = (like.new_empty(shape) for shape in ((), rows, rows))
    launch(count_rows_kernel, (1,), as_bytes(valid), count, weight, start, rows, HAS_VALID=valid is not None, BN=1024)
    return count, weight, start


def inverse_norms(prototypes: Tensor, out: Tensor) -> None:
    """out [C] = 1 / norm of each row, 0 for rows without a direction."""
    from .triton_kernels import norms_kernel

    cols, dim = prototypes.shape
    launch(
        norms_kernel,
        (cdiv(cols, 16),),
        prototypes, out, cols, dim, prototypes.stride(0), NORM_FLOOR, DOWN,
        BK=16,
        BD=128,
    )  # fmt: skip


class _Pairs:
    """(maximum, sum) of each row over the blocks of columns seen so far."""

    def __init__(self, rows: int, num_blocks: int, like: Tensor) -> None:
        self.peaks, self.sums = (like.new_empty((num_blocks, rows), dtype=torch.float32) for _ in range(2))
        self.seen = 0

    def merged(self) -> Pair:
        """The pair over all blocks."""
        peaks, sums = (self.peaks.new_empty(self.peaks.shape[1]) for _ in range(2))
        self._merge(peaks, sums, None, None)
        return peaks, sums

    def scale(self, u2: Tensor, valid: Tensor | None) -> Tensor:
        """u2, into which minus the logarithm of the pair over all blocks has gone, -inf for rows that are not valid."""
        self._merge(None, None, u2, valid)
        return u2

    def _merge(self, peaks: Tensor | None, sums: Tensor | None, u2: Tensor | None, valid: Tensor | None) -> None:
        from .triton_kernels import merge_pairs_kernel

        rows = self.peaks.shape[1]
        launch(
            merge_pairs_kernel,
            (cdiv(rows, 8),),
            self.peaks, self.sums, as_bytes(valid), peaks, sums, u2,
            rows, self.seen,
            SCALE=u2 is not None,
            HAS_VALID=valid is not None,
            BN=8,
            BB=64,
        )  # fmt: skip


class RowPairs:
    """Per row (maximum, sum of 2^(entry - maximum)) of score tiles of the widths given."""

    def __init__(self, rows: int, widths: Sequence[int], like: Tensor) -> None:
        self.pairs = _Pairs(rows, sum(cdiv(width, STRIPE) for width in widths), like)

    def add(self, scores: Tensor, factor: float, v2: Tensor | None, col_scale: Tensor | None, row_scale: Tensor | None) -> None:
        from .triton_kernels import row_pairs_kernel

        rows, cols = scores.shape
        launch(
            row_pairs_kernel,
            (cdiv(cols, STRIPE), cdiv(rows, ROW_TILE["BN"])),
            scores, row_scale, col_scale, v2, self.pairs.peaks, self.pairs.sums,
            rows, cols, self.pairs.seen, scores.stride(0), factor,
            HAS_ROW_SCALE=row_scale is not None,
            HAS_COL_SCALE=col_scale is not None,
            HAS_V=v2 is not None,
            ALIGN=alignment(scores),
            COLUMNS=STRIPE,
            **ROW_TILE,
        )  # fmt: skip
        self.pairs.seen += cdiv(cols, STRIPE)

    def result(self) -> Pair:
        return self.pairs.merged()


class RowSums:
    """What the tiles of one iteration add up: pairs of each row of the plan."""

    def __init__(self, u2: Tensor, widths: Sequence[int]) -> None:
        rows = u2.shape[0]
        self.pairs = _Pairs(rows, sum(cdiv(width, COLUMN_TILE["BK"]) for width in widths), u2)

    def iterate(
        self,
        scores: Tensor,
        factor: float,
        col_scale: Tensor | None,
        row_scale: Tensor | None,
        u2: Tensor,
        v2_old: Tensor | None,
        targets: Tensor,
        v2_new: Tensor,
    ) -> None:
        """Scale the columns of one tile [n, C] to `targets`, into v2_new, and take the rows of the result along."""
        _launch_columns(scores, factor, col_scale, row_scale, u2, (targets, v2_new), self.pairs, None)
        self.pairs.seen += cdiv(scores.shape[1], COLUMN_TILE["BK"])

    def scale(self, u2: Tensor, valid: Tensor | None, row_log_sums: Callable[[], Tensor]) -> Tensor:
        """The new u2, with which every valid row sums to one; sums in the log domain lose no rows."""
        return self.pairs.scale(u2, valid)


def column_statistics(scores: Tensor, factor: float, u2: Tensor, col_scale: Tensor | None, row_scale: Tensor | None) -> Pair:
    """Per column [C] the largest entry plus u2 in bits and the sum of 2^(entry - largest)."""
    peaks, sums = u2.new_empty(scores.shape[1]), u2.new_empty(scores.shape[1])
    _launch_columns(scores, factor, col_scale, row_scale, u2, (None, None), None, (peaks, sums))
    return peaks, sums


def _launch_columns(scores, factor, col_scale, row_scale, u2, scaled, pairs: _Pairs | None, statistics) -> None:
    from .triton_kernels import columns_kernel

    rows, cols = scores.shape
    launch(
        columns_kernel,
        (cdiv(cols, COLUMN_TILE["BK"]),),
        scores, row_scale, col_scale, u2, *scaled,
        *((pairs.peaks, pairs.sums) if pairs else (None, None)), *(statistics or (None, None)),
        rows, cols, pairs.seen if pairs else 0, scores.stride(0), factor,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_COL_SCALE=col_scale is not None,
        ITERATE=pairs is not None,
        ALIGN=alignment(scores),
        **COLUMN_TILE,
    )  # fmt: skip


class Losses:
    """The loss of each row, tile by tile."""

    def __init__(self, rows: int, widths: Sequence[int], like: Tensor) -> None:
        self.partial = like.new_empty((sum(cdiv(width, STRIPE) for width in widths), rows), dtype=torch.float32)
        self.seen = 0

    def add(
        self,
        text: Tensor,
        vision: Tensor,
        score_gradients: Tensor | None,
        *,
        text_row_scale: Tensor | None,
        vision_row_scale: Tensor | None,
        col_scale: Tensor | None,
        u2: Tensor,
        v2: Tensor | None,
        target_weight: Tensor | None,
        peaks2: Tensor,
        sums: Tensor,
        row_weight: Tensor,
        text_factor: float,
        vision_factor: float,
        grad_factor: float,
    ) -> None:
        """Add a tile's loss and write its score gradients, if they are wanted; see the kernel."""
        from .triton_kernels import loss_kernel

        rows, cols = text.shape
        gradients = vision if score_gradients is None else score_gradients
        launch(
            loss_kernel,
            (cdiv(cols, STRIPE), cdiv(rows, LOSS_TILE["BN"])),
            text, vision, gradients, text_row_scale, vision_row_scale, col_scale, u2, v2, target_weight, peaks2, sums,
            row_weight, self.partial,
            rows, cols, self.seen, text.stride(0), vision.stride(0), gradients.stride(-2), gradients.stride(0),
            text_factor, vision_factor, grad_factor,
            HAS_ROW_SCALE=text_row_scale is not None,
            HAS_COL_SCALE=col_scale is not None,
            HAS_V=v2 is not None,
            HAS_WEIGHT=target_weight is not None,
            GRADIENT=score_gradients is not None,
            TERMS=1 if score_gradients is None else score_gradients.shape[0],
            ALIGN=alignment(text, vision),
            COLUMNS=STRIPE,
            **LOSS_TILE,
        )  # fmt: skip
        self.seen += cdiv(cols, STRIPE)

    def total(self, row_weight: Tensor) -> Tensor:
        """Weighted sum over the rows, a scalar."""
        from .triton_kernels import total_kernel

        total = self.partial.new_empty(())
        rows = self.partial.shape[1]
        launch(
            total_kernel,
            (1,),
            self.partial, row_weight, total, rows, self.seen, 1.0 / LOG2E,
            BN=256,
            BB=16,
            num_warps=8,
        )  # fmt: skip
        return total


def through_feature_lengths(gradients: Tensor, features: Features, normalize: bool) -> Tensor:
    """The gradient of vision [n, D] as it came from that of its rows as they were multiplied, [terms, n, D]."""
    _, rows, dim = gradients.shape
    out = gradients.new_empty((rows, dim))
    scale = features.row_scale
    _launch_lengths(gradients, features.rows, scale, features.inverse_length, out, normalize)
    return out


def through_prototype_lengths(gradients: Tensor, prototypes: Tensor, scales: Tensor) -> None:
    """The same for prototypes, in place: gradients [C, D], which have their scales already."""
    _launch_lengths(gradients.unsqueeze(0), prototypes, scales, None, gradients, True)


def _launch_lengths(gradients, rows, scale, inverse, out, has_rows: bool) -> None:
    from .triton_kernels import through_length_kernel

    terms, num_rows, dim = gradients.shape
    launch(
        through_length_kernel,
        (num_rows,),
        gradients, rows, scale, inverse, out,
        num_rows, dim, rows.stride(0),
        HAS_ROW_SCALE=scale is not None,
        HAS_INVERSE=inverse is not None,
        HAS_ROWS=has_rows,
        ROW_TERMS=rows.shape[1] // max(dim, 1),
        TERMS=terms,
        BD=channels(dim),
    )  # fmt: skip
