"""The steps of alignment_loss over one score tile on the CPU: csrc for everything but the matrix products, which torch's
BLAS does better than kernels of ours (docs/kernels.md has the measurement)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer
from .._log_domain.cpu import call_step, column_statistics, update_row_statistics
from . import streaming
from .call import Call
from .reference import SCALE_DOWN
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

NEEDS_WIDE_PROTOTYPES = True
# A score tile and a tile of prototypes stay in the last level cache together.
TILE_LIMITS = TileLimits(score_elements=1 << 18, prototype_elements=1 << 22, min_cols=512, max_cols=8192)

# Row sums below this share of the largest column weight may have lost terms to underflow (as in csrc/sinkhorn/cpu).
LOST_SHARE = {torch.float32: 1e-20, torch.float64: 1e-200}


def unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu backend needs tensors on the cpu, not on {device}"
    return _native.cpu_unavailable_reason()


def declines(call: Call) -> str | None:
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Loss and gradient of vision."""
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


def products(features: Tensor, prototypes: Tensor, out: Tensor) -> None:
    """out [n, C] = features [n, D] @ prototypes [C, D]^T."""
    torch.mm(features, prototypes.T, out=out)


def add_products(score_gradients: Tensor, prototypes: Tensor, out: Tensor) -> None:
    """out [n, D] += score_gradients [n, C] @ prototypes [C, D]."""
    out.addmm_(score_gradients, prototypes)


def inverse_norms(prototypes: Tensor, floor: float, out: Tensor) -> None:
    """out [C] = 1 / max(norm of each row, floor)."""
    norms = torch.linalg.vector_norm(prototypes, dim=1)
    torch.reciprocal(norms.clamp(min=floor), out=out)
    too_long = norms == torch.inf  # in the squares
    if bool(too_long.any()):
        down = SCALE_DOWN[prototypes.dtype]
        again = torch.linalg.vector_norm(prototypes[too_long] * down, dim=1)
        # One beyond the largest number has no scale that could be multiplied by: NaN, not a cosine of zero.
        out[too_long] = torch.where((again / down).isfinite(), again.reciprocal() * down, torch.nan)


class RowSums:
    """What the tiles of one iteration add up: per row the sum of the plan, and the largest weight of any column."""

    def __init__(self, u2: Tensor) -> None:
        self.sums = torch.zeros(u2.shape, dtype=torch.float64)
        self.largest_weight = u2.new_zeros(1)


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
    """Scale the columns of one tile [n, C] to `targets`, into v2_new (may be v2_old; None: the first iteration), and add the
    row sums of the result."""
    call_step(
        "iterate",
        scores,
        factor,
        col_scale=col_scale,
        col_marginals=targets,
        u2=u2,
        v2=v2_old,
        v2_new=v2_new,
        row_sums=row_sums.sums,
        largest_weight=row_sums.largest_weight,
    )


def scale_rows(u2: Tensor, row_sums: RowSums, row_log_sums: Callable[[], Tensor]) -> Tensor:
    """The new u2, with which every row that takes part sums to one. row_log_sums() sums the rows again in the log domain, for
    rows whose entries fell below the range of floating point numbers."""
    takes_part = u2 != -torch.inf  # so does NaN
    lost = takes_part & (row_sums.sums < LOST_SHARE[u2.dtype] * row_sums.largest_weight)
    scaled = u2 - row_sums.sums.log2().to(u2.dtype)
    if bool(lost.any()):
        scaled = torch.where(lost, -row_log_sums(), scaled)
    return torch.where(takes_part, scaled, -torch.inf)


def loss_tile(text: Tensor, vision: Tensor, *, gradient: bool, **arguments: Tensor | float | None) -> None:
    """Add a tile's loss to row_loss2 and, if wanted, turn its vision scores into the gradient; see the header for the rest."""
    if text.numel() == 0:
        return
    params = Params(
        text=text.data_ptr(),
        vision=vision.data_ptr(),
        text_stride=text.stride(0),
        vision_stride=vision.stride(0),
        num_rows=text.shape[0],
        num_cols=text.shape[1],
        gradient=int(gradient),
        dtype=_native.DTYPE_CODES[text.dtype],
        **{name: pointer(x) if isinstance(x, Tensor) or x is None else x for name, x in arguments.items()},
    )
    _native.cpu_function("alignment_loss_tile", Params)(params)
