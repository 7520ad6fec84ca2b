"""The steps of alignment_loss over one score tile in Triton. Nothing waits for the device."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..._triton import architecture, dot_precision, launch, unavailable_reason
from .._log_domain import triton_steps
from .._log_domain.triton_steps import blocks
from . import streaming
from .call import Call
from .streaming import TileLimits

__all__ = [
    "NEEDS_WIDE_PROTOTYPES",
    "TILE_LIMITS",
    "RowSums",
    "add_products",
    "column_statistics",
    "declines",
    "forward",
    "inverse_norms",
    "iterate",
    "loss_tile",
    "products",
    "scale_rows",
    "unavailable_reason",
    "update_row_statistics",
]

NEEDS_WIDE_PROTOTYPES = False
# A score tile stays in the second level cache of a large GPU; fewer, larger tiles mean fewer launches.
TILE_LIMITS = TileLimits(score_elements=1 << 22, prototype_elements=1 << 25, min_cols=512, max_cols=32768)

# Of column and row sums, whatever the rows of a batch: the height that sinkhorn's own choice has from 33 rows on.
SUM_TILE = dict(BN=64, BK=64)
PRODUCT_TILE = dict(BN=64, BK=64, BD=32)
NUM_WARPS, PRODUCT_WARPS = 4, 8  # three TF32 products of a 64 x 64 tile by four warps spill


def declines(call: Call) -> str | None:
    return "the Triton kernels have no float64" if call.vision.dtype == torch.float64 else None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Loss and gradient of vision."""
    return streaming.forward(call, steps=sys.modules[__name__])


column_statistics = partial(triton_steps.column_statistics, tile=SUM_TILE)
update_row_statistics = partial(triton_steps.update_row_statistics, tile=SUM_TILE)


def alignment(*scores: Tensor) -> int:
    """The largest power of two up to 16 that divides columns and row strides of tiles [n, C] of the same shape."""
    return math.gcd(16, scores[0].shape[1], *(x.stride(0) for x in scores))


def products(features: Tensor, prototypes: Tensor, out: Tensor) -> None:
    """out [n, C] = features [n, D] @ prototypes [C, D]^T, prototypes of any dtype."""
    from .triton_kernels import products_kernel

    (rows, dim), cols = features.shape, prototypes.shape[0]
    launch(
        products_kernel,
        (blocks(rows, PRODUCT_TILE["BN"]), blocks(cols, PRODUCT_TILE["BK"])),
        features, prototypes, out,
        rows, cols, dim, prototypes.stride(0), out.stride(0),
        PRECISION=dot_precision(architecture(out.device), torch.float32),
        ALIGN=alignment(out),
        **PRODUCT_TILE,
        num_warps=PRODUCT_WARPS,
    )  # fmt: skip


def add_products(score_gradients: Tensor, prototypes: Tensor, out: Tensor) -> None:
    """out [n, D] += score_gradients [n, C] @ prototypes [C, D]."""
    from .triton_kernels import gradient_kernel

    (rows, cols), dim = score_gradients.shape, prototypes.shape[1]
    tile = dict(BN=PRODUCT_TILE["BN"], BK=PRODUCT_TILE["BD"], BD=PRODUCT_TILE["BK"])
    launch(
        gradient_kernel,
        (blocks(rows, tile["BN"]), blocks(dim, tile["BD"])),
        score_gradients, prototypes, out,
        rows, cols, dim, score_gradients.stride(0), prototypes.stride(0),
        PRECISION=dot_precision(architecture(out.device), torch.float32),
        ALIGN=alignment(score_gradients),
        **tile,
        num_warps=PRODUCT_WARPS,
    )  # fmt: skip


def inverse_norms(prototypes: Tensor, floor: float, out: Tensor) -> None:
    """out [C] = 1 / max(norm of each row, floor)."""
    from .triton_kernels import norms_kernel

    cols, dim = prototypes.shape
    launch(
        norms_kernel,
        (blocks(cols, 16),),
        prototypes, out, cols, dim, prototypes.stride(0), floor,
        BK=16,
        BD=128,
        num_warps=NUM_WARPS,
    )  # fmt: skip


class RowSums:
    """What the tiles of one iteration add up: (maximum, sum) of each row of the plan."""

    def __init__(self, u2: Tensor) -> None:
        self.peaks = torch.full_like(u2, -torch.inf)
        self.sums = torch.zeros_like(u2)


def iterate(
    scores: Tensor,
    factor: float,
    col_scale: Tensor | None,
    u2: Tensor,
    v2_old: Tensor | None,
    targets: Tensor,
    v2_new: Tensor,
    row_sums: RowSums,
) -> None:
    """Scale the columns of one tile [n, C] to `targets`, into v2_new, and merge the rows of the result into row_sums."""
    pairs = triton_steps.column_step(scores.unsqueeze(0), factor, u2, None, targets, v2_new, col_scale=col_scale, tile=SUM_TILE)
    triton_steps.merge_rows(*pairs, peaks=row_sums.peaks, sums=row_sums.sums)


def scale_rows(u2: Tensor, row_sums: RowSums, row_log_sums: Callable[[], Tensor]) -> Tensor:
    """The new u2, with which every row that takes part sums to one; sums in the log domain lose no rows."""
    return torch.where(u2 != -torch.inf, -(row_sums.peaks + row_sums.sums.log2()), -torch.inf)


def loss_tile(
    text: Tensor,
    vision: Tensor,
    *,
    col_scale: Tensor | None,
    u2: Tensor,
    v2: Tensor | None,
    target_weight: Tensor,
    peaks2: Tensor,
    sums: Tensor,
    row_weight: Tensor,
    row_loss2: Tensor,
    text_factor: float,
    vision_factor: float,
    grad_factor: float,
    gradient: bool,
) -> None:
    """Add a tile's loss to row_loss2 and, if wanted, turn its vision scores into the gradient; see the kernel."""
    from .triton_kernels import loss_tile_kernel

    rows, cols = text.shape
    tile = dict(BN=16, BK=128)
    partial_loss2 = u2.new_empty((blocks(cols, tile["BK"]), rows))
    launch(
        loss_tile_kernel,
        (blocks(cols, tile["BK"]), blocks(rows, tile["BN"])),
        text, vision, col_scale, u2, v2, target_weight, peaks2, sums, row_weight, partial_loss2,
        rows, cols, text.stride(0), vision.stride(0), text_factor, vision_factor, grad_factor,
        HAS_COL_SCALE=col_scale is not None,
        HAS_V=v2 is not None,
        GRADIENT=gradient,
        ALIGN=alignment(text, vision),
        **tile,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    row_loss2 += partial_loss2.sum(0, dtype=torch.float64)
