"""The steps of sinkhorn over matrices of scores in Triton: chooses tiles, allocates scratch, launches triton_kernels.

Nothing waits for the device.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._triton import alignment_of, cdiv, launch, next_power_of_2
from ..._units import LOG2E
from . import triton_kernels as kernels
from .call import item_stride

MERGE_TILE = dict(BN=32, BB=32, num_warps=1)


def column_tile(num_rows: int, num_cols: int) -> dict[str, int]:
    """Rows and columns per tile of 4096 elements: wide enough for full memory transactions, small enough for many programs."""
    rows = min(max(16, next_power_of_2(num_rows)), 64)
    return dict(BN=rows, BK=min(4096 // rows, max(16, next_power_of_2(num_cols))))


class Layout(NamedTuple):
    """How scores [n, K] or [G, n, K] are divided among programs."""

    batch: tuple[int, ...]
    items: int
    blocks: int  # of columns
    row_blocks: int
    sizes: tuple[int, int, int, int, int]  # rows, columns, blocks, strides of items and of rows: the kernels' arguments
    pairs: tuple[int, int, int]  # the shape of memory for a number per row and block, see triton_kernels.pair_stride
    options: dict[str, int]  # of all kernels


@functools.lru_cache(maxsize=1024)
def layout(shape: torch.Size, strides: tuple[int, ...]) -> Layout:
    *batch, rows, cols = shape
    tile = column_tile(rows, cols)
    items, blocks = math.prod(batch), cdiv(cols, tile["BK"])
    sizes = (rows, cols, blocks, strides[0] if batch else 0, strides[-2])
    pairs = (items, blocks, cdiv(rows, 16) * 16)
    options = dict(ALIGN=alignment_of((shape, strides)), **tile)
    return Layout(tuple(batch), items, blocks, cdiv(rows, tile["BN"]), sizes, pairs, options)


class Steps:
    """Those of one call, over scores [n, K] or [G, n, K]. Potentials u2 [.., n] and v2 [.., K] are in bits."""

    def __init__(self, scores: Tensor, factor: float) -> None:
        found = layout(scores.shape, scores.stride())
        self.batch, self.items, self.blocks, self.row_blocks, self.sizes, pairs, self.options = found
        self.scores, self.factor = scores, factor
        self.col_share = self.sizes[0] / max(self.sizes[1], 1)  # the marginal of each column where none are given
        # (maximum, sum) pairs of the rows over each block of columns
        self.row_peaks = scores.new_empty(*pairs, dtype=torch.float32)
        self.row_sums = scores.new_empty(*pairs, dtype=torch.float32)

    def new_rows(self) -> Tensor:
        """Memory for a number per row, [.., n]."""
        return self.scores.new_empty(*self.batch, self.sizes[0], dtype=torch.float32)

    def new_cols(self) -> Tensor:
        """Memory for a number per column, [.., K]."""
        return self.scores.new_empty(*self.batch, self.sizes[1], dtype=torch.float32)

    def scale_columns(
        self,
        iteration: int,
        marginals: tuple[Tensor | None, Tensor | None],
        u2: Tensor,
        v2: Tensor,
        v2_new: Tensor,
        errors: Tensor | None = None,
        stop: Tensor | None = None,
    ) -> None:
        """v2_new with which the columns have their marginals, and the rows' pairs after that. Of iteration 0, u2 and v2 are
        not read. With `stop`: see the kernel."""
        a, b = marginals
        launch(
            kernels.column_step_kernel,
            (self.blocks, self.items),
            self.scores, u2, v2, a, b, v2_new, self.row_peaks, self.row_sums, None, None, errors, stop,
            *self.sizes, item_stride(a), item_stride(b), iteration, self.factor, self.col_share,
            ITERATE=True,
            HAS_TOL=stop is not None,
            **self.options,
        )  # fmt: skip

    def column_statistics(self, u2: Tensor) -> tuple[Tensor, Tensor]:
        """Per column [.., K] the largest entry plus u2 and the sum of 2^(entry - largest)."""
        peaks, sums = self.new_cols(), self.new_cols()
        launch(
            kernels.column_step_kernel,
            (self.blocks, self.items),
            self.scores, u2, *[None] * 6, peaks, sums, None, None,
            *self.sizes, 0, 0, 0, self.factor, self.col_share,
            ITERATE=False,
            HAS_TOL=False,
            **self.options,
        )  # fmt: skip
        return peaks, sums

    def scale_rows(self, a: Tensor | None, u2: Tensor, stop: Tensor | None = None) -> None:
        """u2 with which the rows have their marginals a, from their pairs."""
        self._merge(a, u2, stop, scale=True)

    def row_log_sums(self, v2: Tensor) -> Tensor:
        """log2 of the row sums [.., n] of 2^(entry + v2)."""
        launch(
            kernels.row_step_kernel,
            (self.blocks, self.items, self.row_blocks),
            self.scores, v2, self.row_peaks, self.row_sums, *self.sizes, self.factor,
            **self.options,
        )  # fmt: skip
        sums = self.new_rows()
        self._merge(None, sums, None, scale=False)
        return sums

    def _merge(self, a: Tensor | None, out: Tensor, stop: Tensor | None, *, scale: bool) -> None:
        rows = self.sizes[0]
        launch(
            kernels.merge_rows_kernel,
            (cdiv(rows, MERGE_TILE["BN"]), self.items),
            self.row_peaks, self.row_sums, a, out, stop,
            rows, self.blocks, item_stride(a),
            SCALE=scale,
            HAS_TOL=stop is not None,
            **MERGE_TILE,
        )  # fmt: skip

    def plan(self, u2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """2^(entry + u2 + v2) [.., n, K], and both potentials as natural logarithms."""
        plan = torch.empty_like(self.scores, dtype=torch.float32, memory_format=torch.contiguous_format)
        u, v = self.new_rows(), self.new_cols()
        launch(
            kernels.plan_kernel,
            (self.blocks, self.items, self.row_blocks),
            self.scores, u2, v2, plan, u, v, *self.sizes, self.factor, 1 / LOG2E,
            **self.options,
        )  # fmt: skip
        return plan, u, v
