"""The steps of alignment_loss between its products on the CPU: csrc/cpu over one tile of scores, torch over the features."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer
from ..._units import LOG2E
from .._log_domain import cpu as log_domain
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

# A score tile and a tile of prototypes stay in the last level cache together. Few rows take longer in wider tiles.
LIMITS = Limits(
    score_elements=1 << 18,
    prototype_elements=1 << 22,
    min_cols=512,
    max_cols=2048,
    whole_kept=False,
    pairs=0.0,
    share_of_many=1 / 4,
)

# Row sums below this share of the largest column weight may have lost terms to underflow (as in csrc/sinkhorn/cpu).
LOST_SHARE = {torch.float32: 1e-20, torch.float64: 1e-200}


def unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu backend needs tensors on the cpu, not on {device}"
    return _native.cpu_unavailable_reason()


def declines(call: Call) -> str | None:
    return None


def on_gpu(device: torch.device) -> bool:
    return False


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradients of vision and of prototypes."""
    return streaming.forward(call, steps=sys.modules[__name__])


class Params(ctypes.Structure):
    """comp_kernels_alignment_loss_params of csrc/include/comp_kernels/alignment_loss.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("text", "vision", "col_scale", "u2", "v2", "target_weight", "peaks2", "sums")),
        *((name, ctypes.c_void_p) for name in ("row_weight", "row_loss2")),
        *((name, ctypes.c_int64) for name in ("text_stride", "vision_stride", "num_rows", "num_cols")),
        *((name, ctypes.c_double) for name in ("text_factor", "vision_factor", "grad_factor")),
        *((name, ctypes.c_int64) for name in ("gradient", "dtype")),
    ]


def prepare_features(call: Call, products: Matmul) -> Features:
    vision, text, valid = call.vision, call.text, call.valid
    rows, dim = vision.shape
    stored = vision.new_empty((2 * rows, dim), dtype=products.dtype)
    inverse = stored.new_ones(2 * rows)
    for x, out, inverse_length in zip((vision, text), stored.split(max(rows, 1)), inverse.split(max(rows, 1))):
        x = x.to(products.dtype)
        if valid is not None:
            x = torch.where(valid.unsqueeze(-1), x, 0.0)
            inverse_length.copy_(valid)
        if call.normalize:
            scale, x = inverse_lengths(x)
            inverse_length.copy_(scale)
        out.copy_(x)
    return Features(stored, None, inverse)


def count_rows(rows: int, valid: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(number of valid rows, their weights in the mean [n], 0 for each of them and -inf for the others [n])."""
    valid = like.new_ones(rows, dtype=torch.bool) if valid is None else valid
    count = valid.sum(dtype=like.dtype)
    return count, valid / count.clamp(min=1), torch.where(valid, 0.0, -torch.inf).to(like.dtype)


def inverse_lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """One over the lengths [n] of the rows of x [n, D], 0 for those without a direction, and the rows of length one."""
    length = torch.linalg.vector_norm(x, dim=-1)
    too_long = length == torch.inf  # in the squares
    factor = torch.ones_like(length).masked_fill_(too_long, SCALE_DOWN[x.dtype])
    if bool(too_long.any()):
        x = x * factor.unsqueeze(-1)
        length = torch.where(too_long, torch.linalg.vector_norm(x, dim=-1), length)
    none = length <= NORM_FLOOR  # NaN is not
    rows = torch.where(none.unsqueeze(-1), 0.0, x / length.unsqueeze(-1))
    return torch.where(none, 0.0, factor / length), rows


def inverse_norms(prototypes: Tensor, out: Tensor) -> None:
    """out [C] = 1 / norm of each row, 0 for rows without a direction."""
    norms = torch.linalg.vector_norm(prototypes, dim=1, dtype=out.dtype)
    torch.reciprocal(norms, out=out)
    out.masked_fill_(norms <= NORM_FLOOR, 0.0)
    too_long = norms == torch.inf  # in the squares
    if bool(too_long.any()):
        down = SCALE_DOWN[out.dtype]
        again = torch.linalg.vector_norm(prototypes[too_long].to(out.dtype) * down, dim=1)
        # One beyond the largest number has no scale that could be multiplied by: NaN, not a cosine of zero.
        out[too_long] = torch.where((again / down).isfinite(), again.reciprocal() * down, torch.nan)


class RowPairs:
    """Per row (maximum, sum of 2^(entry - maximum)) of score tiles."""

    def __init__(self, rows: int, widths: Sequence[int], like: Tensor) -> None:
        self.peaks = like.new_full((rows,), -torch.inf)
        self.sums = torch.zeros_like(self.peaks)

    def add(self, scores: Tensor, factor: float, v2: Tensor | None, col_scale: Tensor | None, row_scale: Tensor | None) -> None:
        log_domain.update_row_statistics(scores, factor, self.peaks, self.sums, v2, col_scale)

    def result(self) -> Pair:
        return self.peaks, self.sums


class RowSums:
    """What the tiles of one iteration add up: per row the sum of the plan, and the largest weight of any column."""

    def __init__(self, u2: Tensor, widths: Sequence[int]) -> None:
        self.sums = torch.zeros(u2.shape, dtype=torch.float64)
        self.largest_weight = u2.new_zeros(1)

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
        """Scale the columns of one tile [n, C] to `targets`, into v2_new (may be v2_old; None: the first iteration), and add
        the row sums of the result."""
        log_domain.call_step(
            "iterate",
            scores,
            factor,
            col_scale=col_scale,
            col_marginals=targets,
            u2=u2,
            v2=v2_old,
            v2_new=v2_new,
            row_sums=self.sums,
            largest_weight=self.largest_weight,
        )

    def scale(self, u2: Tensor, valid: Tensor | None, row_log_sums: Callable[[], Tensor]) -> Tensor:
        """The new u2, with which every valid row sums to one. row_log_sums() sums the rows again in the log domain, for rows
        whose entries fell below the range of floating point numbers."""
        takes_part = u2 != -torch.inf  # so does NaN
        lost = takes_part & (self.sums < LOST_SHARE[u2.dtype] * self.largest_weight)
        scaled = u2 - self.sums.log2().to(u2.dtype)
        if bool(lost.any()):
            scaled = torch.where(lost, -row_log_sums(), scaled)
        return torch.where(takes_part, scaled, -torch.inf)


def column_statistics(scores: Tensor, factor: float, u2: Tensor, col_scale: Tensor | None, row_scale: Tensor | None) -> Pair:
    """Per column [C] the largest entry plus u2 in bits and the sum of 2^(entry - largest)."""
    return log_domain.column_statistics(scores, factor, u2, col_scale)


class Losses:
    """The loss of each row, tile by tile."""

    def __init__(self, rows: int, widths: Sequence[int], like: Tensor) -> None:
        self.row_loss2 = torch.zeros(rows, dtype=torch.float64)
        self.dtype = like.dtype

    def add(
        self,
        text: Tensor,
        vision: Tensor,
        score_gradients: Tensor | None,
        *,
        text_row_scale: Tensor | None,
        vision_row_scale: Tensor | None,
        target_weight: Tensor | None,
        **arguments: Tensor | float | None,
    ) -> None:
        """Add a tile's loss and write its score gradients, if they are wanted (they lie over vision); see the header."""
        if text.numel() == 0:
            return
        if target_weight is None:
            target_weight = torch.ones(text.shape[0], dtype=text.dtype)
        params = Params(
            text=text.data_ptr(),
            vision=vision.data_ptr(),
            target_weight=target_weight.data_ptr(),
            row_loss2=self.row_loss2.data_ptr(),
            text_stride=text.stride(0),
            vision_stride=vision.stride(0),
            num_rows=text.shape[0],
            num_cols=text.shape[1],
            gradient=int(score_gradients is not None),
            dtype=_native.DTYPE_CODES[text.dtype],
            **{name: pointer(x) if isinstance(x, Tensor) or x is None else x for name, x in arguments.items()},
        )
        _native.cpu_function("alignment_loss_tile")(params)

    def total(self, row_weight: Tensor) -> Tensor:
        """Weighted sum over the rows, a scalar."""
        return ((self.row_loss2 * row_weight.double()).sum() / LOG2E).to(self.dtype)


def through_feature_lengths(gradients: Tensor, features: Features, normalize: bool) -> Tensor:
    """The gradient of vision [n, D] as it came from that of its rows as they were multiplied, [1, n, D]."""
    gradient, rows = gradients[0], features.vision
    if normalize:
        gradient = gradient - rows * (gradient * rows).sum(-1, keepdim=True)
    return gradient * features.inverse_length[: features.num_rows].unsqueeze(-1)


def through_prototype_lengths(gradients: Tensor, prototypes: Tensor, scales: Tensor) -> None:
    """The same for prototypes, in place: gradients [C, D], which have their scales already."""
    rows = prototypes.to(gradients.dtype) * scales.unsqueeze(-1)
    gradients -= rows * (gradients * rows).sum(-1, keepdim=True)
