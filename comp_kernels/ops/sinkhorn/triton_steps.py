"""The shared steps over matrices of scores in Triton: chooses tiles, allocates scratch, launches sinkhorn's kernels.

Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._triton import launch

NUM_WARPS = 4
MERGE_TILE = dict(BN=32, BB=32)


def column_tile(num_rows: int, num_cols: int) -> dict[str, int]:
    """Rows and columns per tile of 4096 elements: wide enough for full memory transactions, small enough for many programs."""
    rows = min(max(16, 1 << (max(num_rows, 1) - 1).bit_length()), 64)
    return dict(BN=rows, BK=min(4096 // rows, max(16, 1 << (max(num_cols, 1) - 1).bit_length())))


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def alignment(scores: Tensor) -> int:
    """The largest power of two up to 16 that divides the columns and the strides of scores [G, n, K]."""
    strides = (stride for size, stride in zip(scores.shape[:2], scores.stride()) if size > 1)
    return math.gcd(16, scores.shape[-1], *strides)


def new_pairs(scores: Tensor, tile: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Memory for the (maximum, sum) pairs [G, blocks, pair_stride] of the rows (see triton_kernels.pair_stride)."""
    items, rows, cols = scores.shape
    shape = (items, blocks(cols, tile["BK"]), blocks(rows, 16) * 16)
    return tuple(scores.new_empty(shape, dtype=torch.float32) for _ in range(2))


def column_step(
    scores: Tensor,
    factor: float,
    u2: Tensor,
    v2: Tensor | None,
    targets: Tensor,
    v2_new: Tensor,
    *,
    col_scale: Tensor | None = None,
    errors: Tensor | None = None,
    stop: Tensor | None = None,
    first: bool = True,
    tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Columns to their targets, into v2_new; returns the (maximum, sum) pairs of the rows after that, see new_pairs.

    tile: BN rows and BK columns of a tile, column_tile's unless given.
    """
    tile = tile or column_tile(*scores.shape[1:])
    pairs = new_pairs(scores, tile)
    tensors = (v2, targets, v2_new, *pairs, None, None, errors, stop)
    _launch_columns(scores, factor, u2, col_scale, tensors, True, first, tile)
    return pairs


def column_statistics(
    scores: Tensor, factor: float, u2: Tensor, col_scale: Tensor | None = None, tile: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Per column the largest entry plus u2 in bits and the sum of 2^(entry - largest): scores [G, n, K] or [n, K]."""
    shape = (*scores.shape[:-2], scores.shape[-1])
    peaks, sums = u2.new_empty(shape), u2.new_empty(shape)
    scores = scores.unsqueeze(0) if scores.dim() == 2 else scores
    tensors = (None, None, None, None, None, peaks, sums, None, None)
    _launch_columns(scores, factor, u2, col_scale, tensors, False, True, tile or column_tile(*scores.shape[1:]))
    return peaks, sums


def _launch_columns(scores, factor, u2, col_scale, tensors, iterate: bool, first: bool, tile: dict[str, int]) -> None:
    from ..sinkhorn.triton_kernels import column_step_kernel

    items, rows, cols = scores.shape
    v2, targets, v2_new, row_peaks, row_sums, col_peaks, col_sums, errors, stop = tensors
    num_blocks = blocks(cols, tile["BK"])
    launch(
        column_step_kernel,
        (num_blocks, items),
        scores, col_scale, u2, None if stop is None else v2, targets, v2_new,
        row_peaks, row_sums, col_peaks, col_sums, errors, stop,
        rows, cols, num_blocks, scores.stride(0), scores.stride(1),
        cols if targets is not None and targets.dim() == 2 else 0, factor,
        ITERATE=iterate,
        FIRST=first or stop is None,
        HAS_COL_SCALE=col_scale is not None,
        HAS_TOL=stop is not None,
        ALIGN=alignment(scores),
        **tile,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def row_pairs(
    scores: Tensor, factor: float, v2: Tensor | None, col_scale: Tensor | None = None, tile: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """(maximum, sum) pairs of the entries plus v2, see new_pairs."""
    from ..sinkhorn.triton_kernels import row_step_kernel

    items, rows, cols = scores.shape
    tile = tile or column_tile(rows, cols)
    num_blocks = blocks(cols, tile["BK"])
    row_peaks, row_sums = new_pairs(scores, tile)
    launch(
        row_step_kernel,
        (num_blocks, items, blocks(rows, tile["BN"])),
        scores, col_scale, v2, row_peaks, row_sums,
        rows, cols, num_blocks, scores.stride(0), scores.stride(1), factor,
        HAS_V=v2 is not None,
        HAS_COL_SCALE=col_scale is not None,
        ALIGN=alignment(scores),
        **tile,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return row_peaks, row_sums


def merge_rows(
    row_peaks: Tensor,
    row_sums: Tensor,
    *,
    a: Tensor | None = None,
    u2: Tensor | None = None,
    peaks: Tensor | None = None,
    sums: Tensor | None = None,
    stop: Tensor | None = None,
) -> None:
    """Merge pairs (see new_pairs) over the blocks: into u2 [G, n] with row marginals a, or into the pair peaks, sums [G, n]."""
    from ..sinkhorn.triton_kernels import merge_rows_kernel

    items, num_blocks, _ = row_peaks.shape
    rows = (peaks if u2 is None else u2).shape[-1]
    launch(
        merge_rows_kernel,
        (blocks(rows, MERGE_TILE["BN"]), items),
        row_peaks, row_sums, a, u2, peaks, sums, stop,
        rows, num_blocks, rows if a is not None and a.dim() == 2 else 0,
        SCALE=a is not None,
        HAS_TOL=stop is not None,
        **MERGE_TILE,
        num_warps=1,
    )  # fmt: skip


def update_row_statistics(
    scores: Tensor,
    factor: float,
    peaks: Tensor,
    sums: Tensor,
    v2: Tensor | None = None,
    col_scale: Tensor | None = None,
    tile: dict[str, int] | None = None,
) -> None:
    """Merge the entries of each row of one matrix [n, K] into peaks and sums [n], which start as -inf and 0."""
    merge_rows(*row_pairs(scores.unsqueeze(0), factor, v2, col_scale, tile), peaks=peaks, sums=sums)
