"""The steps of sinkhorn over matrices of scores in Triton: chooses tiles, allocates scratch, launches triton_kernels.

Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton import alignment, cdiv, launch, next_power_of_2

NUM_WARPS = 4
MERGE_TILE = dict(BN=32, BB=32)


def column_tile(num_rows: int, num_cols: int) -> dict[str, int]:
    """Rows and columns per tile of 4096 elements: wide enough for full memory transactions, small enough for many programs."""
    rows = min(max(16, next_power_of_2(num_rows)), 64)
    return dict(BN=rows, BK=min(4096 // rows, max(16, next_power_of_2(num_cols))))


def new_pairs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the (maximum, sum) pairs [G, blocks, pair_stride] of the rows (see triton_kernels.pair_stride)."""
    items, rows, cols = scores.shape
    shape = (items, cdiv(cols, column_tile(rows, cols)["BK"]), cdiv(rows, 16) * 16)
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.float32)


def column_step(
    scores: Tensor,
    factor: float,
    u2: Tensor,
    v2: Tensor | None,
    targets: Tensor,
    v2_new: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    errors: Tensor | None = None,
    stop: Tensor | None = None,
    first: bool = True,
) -> None:
    """Columns to their targets, into v2_new; the (maximum, sum) pairs of the rows after that into `pairs`, see new_pairs."""
    _launch_columns(scores, factor, u2, (v2, targets, v2_new, *pairs, None, None, errors, stop), True, first)


def column_statistics(scores: Tensor, factor: float, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Per column [G, K] the largest entry plus u2 in bits and the sum of 2^(entry - largest)."""
    items, _, cols = scores.shape
    peaks, sums = u2.new_empty((items, cols)), u2.new_empty((items, cols))
    _launch_columns(scores, factor, u2, (None, None, None, None, None, peaks, sums, None, None), False, True)
    return peaks, sums


def _launch_columns(scores, factor, u2, tensors, iterate: bool, first: bool) -> None:
    from .triton_kernels import column_step_kernel

    items, rows, cols = scores.shape
    v2, targets, v2_new, row_peaks, row_sums, col_peaks, col_sums, errors, stop = tensors
    tile = column_tile(rows, cols)
    num_blocks = cdiv(cols, tile["BK"])
    launch(
        column_step_kernel,
        (num_blocks, items),
        scores, u2, None if stop is None else v2, targets, v2_new,
        row_peaks, row_sums, col_peaks, col_sums, errors, stop,
        rows, cols, num_blocks, scores.stride(0), scores.stride(1),
        cols if targets is not None and targets.dim() == 2 else 0, factor,
        ITERATE=iterate,
        FIRST=first or stop is None,
        HAS_TOL=stop is not None,
        ALIGN=alignment(scores),
        **tile,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def row_pairs(scores: Tensor, factor: float, v2: Tensor | None) -> tuple[Tensor, Tensor]:
    """(maximum, sum) pairs of the entries plus v2, see new_pairs."""
    from .triton_kernels import row_step_kernel

    items, rows, cols = scores.shape
    tile = column_tile(rows, cols)
    num_blocks = cdiv(cols, tile["BK"])
    row_peaks, row_sums = new_pairs(scores)
    launch(
        row_step_kernel,
        (num_blocks, items, cdiv(rows, tile["BN"])),
        scores, v2, row_peaks, row_sums,
        rows, cols, num_blocks, scores.stride(0), scores.stride(1), factor,
        HAS_V=v2 is not None,
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
    from .triton_kernels import merge_rows_kernel

    items, num_blocks, _ = row_peaks.shape
    out = peaks if u2 is None else u2
    assert out is not None
    rows = out.shape[-1]
    launch(
        merge_rows_kernel,
        (cdiv(rows, MERGE_TILE["BN"]), items),
        row_peaks, row_sums, a, u2, peaks, sums, stop,
        rows, num_blocks, rows if a is not None and a.dim() == 2 else 0,
        SCALE=a is not None,
        HAS_TOL=stop is not None,
        **MERGE_TILE,
        num_warps=1,
    )  # fmt: skip
