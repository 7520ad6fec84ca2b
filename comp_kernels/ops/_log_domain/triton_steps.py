"""The shared steps over matrices of scores in Triton: chooses tiles, allocates scratch, launches sinkhorn's kernels.

Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton import launch

NUM_WARPS = 4
MERGE_TILE = dict(BN=32, BB=32)


def column_tile(num_rows: int, num_cols: int) -> dict[str, int]:
    """Rows and columns per tile of 4096 elements: wide enough for full memory transactions, small enough for many programs."""
    rows = min(max(16, 1 << (max(num_rows, 1) - 1).bit_length()), 64)
    return dict(BN=rows, BK=min(4096 // rows, max(16, 1 << (max(num_cols, 1) - 1).bit_length())))


def num_blocks(num_rows: int, num_cols: int) -> int:
    return -(-num_cols // column_tile(num_rows, num_cols)["BK"])


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
) -> tuple[Tensor, Tensor]:
    """Columns to their targets, into v2_new; returns the (maximum, sum) pairs [G, blocks, n] of the rows after that."""
    items, rows, cols = scores.shape
    blocks = num_blocks(rows, cols)
    pairs = [u2.new_empty((items, blocks, rows)) for _ in range(2)]
    _launch_columns(scores, factor, u2, col_scale, (v2, targets, v2_new, *pairs, None, None, errors, stop), True, first)
    return pairs[0], pairs[1]


def column_statistics(scores: Tensor, factor: float, u2: Tensor, col_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per column the largest entry plus u2 in bits and the sum of 2^(entry - largest): scores [G, n, K] or [n, K]."""
    shape = (*scores.shape[:-2], scores.shape[-1])
    peaks, sums = u2.new_empty(shape), u2.new_empty(shape)
    scores = scores.unsqueeze(0) if scores.dim() == 2 else scores
    _launch_columns(scores, factor, u2, col_scale, (None, None, None, None, None, peaks, sums, None, None), False, True)
    return peaks, sums


def _launch_columns(scores, factor, u2, col_scale, pointers, iterate: bool, first: bool) -> None:
    from ..sinkhorn.triton_kernels import column_step_kernel

    items, rows, cols = scores.shape
    v2, targets, v2_new, row_peaks, row_sums, col_peaks, col_sums, errors, stop = pointers
    launch(
        column_step_kernel,
        (num_blocks(rows, cols), items),
        scores, col_scale, u2, v2, targets, v2_new, row_peaks, row_sums, col_peaks, col_sums, errors, stop,
        rows, cols, num_blocks(rows, cols), scores.stride(0), scores.stride(1),
        cols if targets is not None and targets.dim() == 2 else 0, factor,
        ITERATE=iterate,
        FIRST=first,
        HAS_COL_SCALE=col_scale is not None,
        HAS_TOL=stop is not None,
        **column_tile(rows, cols),
        num_warps=NUM_WARPS,
    )  # fmt: skip


def row_pairs(scores: Tensor, factor: float, v2: Tensor | None, col_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(maximum, sum) pairs [G, blocks, n] of the entries plus v2."""
    from ..sinkhorn.triton_kernels import row_step_kernel

    items, rows, cols = scores.shape
    tile, blocks = column_tile(rows, cols), num_blocks(rows, cols)
    row_peaks, row_sums = (scores.new_empty((items, blocks, rows), dtype=torch.float32) for _ in range(2))
    launch(
        row_step_kernel,
        (blocks, items, -(-rows // tile["BN"])),
        scores, col_scale, v2, row_peaks, row_sums,
        rows, cols, blocks, scores.stride(0), scores.stride(1), factor,
        HAS_V=v2 is not None,
        HAS_COL_SCALE=col_scale is not None,
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
    """Merge pairs [G, blocks, n] over the blocks: into u2 [G, n] with row marginals a, or into the pair peaks, sums [G, n]."""
    from ..sinkhorn.triton_kernels import merge_rows_kernel

    items, blocks, rows = row_peaks.shape
    launch(
        merge_rows_kernel,
        (-(-rows // MERGE_TILE["BN"]), items),
        row_peaks, row_sums, a, u2, peaks, sums, stop,
        rows, blocks, rows if a is not None and a.dim() == 2 else 0,
        SCALE=a is not None,
        HAS_TOL=stop is not None,
        **MERGE_TILE,
        num_warps=1,
    )  # fmt: skip


def update_row_statistics(
    scores: Tensor, factor: float, peaks: Tensor, sums: Tensor, v2: Tensor | None = None, col_scale: Tensor | None = None
) -> None:
    """Merge the entries of each row of one matrix [n, K] into peaks and sums [n], which start as -inf and 0."""
    merge_rows(*row_pairs(scores.unsqueeze(0), factor, v2, col_scale), peaks=peaks, sums=sums)
