"""The steps of sinkhorn over matrices of scores in Triton: chooses tiles, allocates scratch, launches triton_kernels.

Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._triton import alignment, cdiv, launch, next_power_of_2
from ..._units import LOG2E
from . import triton_kernels as kernels
from .call import item_stride

MERGE_TILE = dict(BN=32, BB=32, num_warps=1)


def column_tile(num_rows: int, num_cols: int) -> dict[str, int]:
    """Rows and columns per tile of 4096 elements: wide enough for full memory transactions, small enough for many programs."""
    rows = min(max(16, next_power_of_2(num_rows)), 64)
    return dict(BN=rows, BK=min(4096 // rows, max(16, next_power_of_2(num_cols))))


class Steps:
    """Those of one call, over scores [n, K] or [G, n, K]. Potentials u2 [.., n] and v2 [.., K] are in bits."""

    def __init__(self, scores: Tensor, factor: float) -> None:
        *self.batch, rows, cols = scores.shape
        self.items = items = math.prod(self.batch)
        tile = column_tile(rows, cols)
        self.scores, self.factor = scores, factor
        self.blocks, self.row_blocks = cdiv(cols, tile["BK"]), cdiv(rows, tile["BN"])
        self.sizes = (rows, cols, self.blocks, scores.stride(0) if self.batch else 0, scores.stride(-2))
        self.col_share = rows / max(cols, 1)  # the marginal of each column where none are given
        self.options = dict(ALIGN=alignment(scores), **tile)
        # (maximum, sum) pairs of the rows over each block of columns, see triton_kernels.pair_stride
        self.row_peaks, self.row_sums = (self.new(items, self.blocks, cdiv(rows, 16) * 16) for _ in range(2))

    def new(self, *shape: int) -> Tensor:
        return self.scores.new_empty(*shape, dtype=torch.float32)

    def new_rows(self) -> Tensor:
        """Memory for a number per row, [.., n]."""
        return self.new(*self.batch, self.sizes[0])

    def new_cols(self) -> Tensor:
        """Memory for a number per column, [.., K]."""
        return self.new(*self.batch, self.sizes[1])

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
        pairs = (self.row_peaks, self.row_sums)
        self._columns((u2, v2, a, b, v2_new, *pairs, None, None, errors, stop), iteration)

    def column_statistics(self, u2: Tensor) -> tuple[Tensor, Tensor]:
        """Per column [.., K] the largest entry plus u2 and the sum of 2^(entry - largest)."""
        peaks, sums = self.new_cols(), self.new_cols()
        self._columns((u2, *[None] * 6, peaks, sums, None, None), 0)
        return peaks, sums

    def _columns(self, tensors: tuple[Tensor | None, ...], iteration: int) -> None:
        _, _, a, b, v2_new, *_ = tensors
        launch(
            kernels.column_step_kernel,
            (self.blocks, self.items),
            self.scores, *tensors, *self.sizes, item_stride(a), item_stride(b), iteration, self.factor, self.col_share,
            ITERATE=v2_new is not None,
            HAS_TOL=tensors[-1] is not None,
            **self.options,
        )  # fmt: skip

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
        plan, u, v = (self.new(*x.shape) for x in (self.scores, u2, v2))
        launch(
            kernels.plan_kernel,
            (self.blocks, self.items, self.row_blocks),
            self.scores, u2, v2, plan, u, v, *self.sizes, self.factor, 1 / LOG2E,
            **self.options,
        )  # fmt: skip
        return plan, u, v
