"""The steps of sinkhorn over matrices of scores in Triton: chooses tiles, allocates scratch, launches triton_kernels.

Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton import alignment, cdiv, launch, next_power_of_2
from ..._units import LOG2E
from . import triton_kernels as kernels

MERGE_TILE = dict(BN=32, BB=32, num_warps=1)


def column_tile(num_rows: int, num_cols: int) -> dict[str, int]:
    """Rows and columns per tile of 4096 elements: wide enough for full memory transactions, small enough for many programs."""
    rows = min(max(16, next_power_of_2(num_rows)), 64)
    return dict(BN=rows, BK=min(4096 // rows, max(16, next_power_of_2(num_cols))))


def item_stride(marginal: Tensor) -> int:
    return marginal.shape[-1] if marginal.dim() == 2 else 0


class Steps:
    """Those of one call, over scores [G, n, K]. Potentials u2 [G, n] and v2 [G, K] are in bits."""

    def __init__(self, scores: Tensor, factor: float) -> None:
        items, rows, cols = scores.shape
        tile = column_tile(rows, cols)
        self.scores, self.factor = scores, factor
        self.blocks, self.row_blocks = cdiv(cols, tile["BK"]), cdiv(rows, tile["BN"])
        self.sizes = (rows, cols, self.blocks, scores.stride(0), scores.stride(1))
        self.options = dict(ALIGN=alignment(scores), **tile)
        # (maximum, sum) pairs of the rows over each block of columns, see triton_kernels.pair_stride
        self.row_peaks, self.row_sums = (self.new(items, self.blocks, cdiv(rows, 16) * 16) for _ in range(2))

    def new(self, *shape: int) -> Tensor:
        return self.scores.new_empty(shape, dtype=torch.float32)

    def scale_columns(
        self,
        iteration: int,
        marginals: tuple[Tensor, Tensor],
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
        self._columns((u2, v2, a, b, v2_new, *pairs, None, None, errors, stop), item_stride(a), item_stride(b), iteration)

    def column_statistics(self, u2: Tensor) -> tuple[Tensor, Tensor]:
        """Per column [G, K] the largest entry plus u2 and the sum of 2^(entry - largest)."""
        items, _, cols = self.scores.shape
        peaks, sums = self.new(items, cols), self.new(items, cols)
        self._columns((u2, *[None] * 6, peaks, sums, None, None), 0, 0, 0)
        return peaks, sums

    def _columns(self, tensors: tuple[Tensor | None, ...], a_item_stride: int, b_item_stride: int, iteration: int) -> None:
        launch(
            kernels.column_step_kernel,
            (self.blocks, self.scores.shape[0]),
            self.scores, *tensors, *self.sizes, a_item_stride, b_item_stride, iteration, self.factor,
            ITERATE=tensors[2] is not None,
            HAS_TOL=tensors[-1] is not None,
            **self.options,
        )  # fmt: skip

    def scale_rows(self, a: Tensor, u2: Tensor, stop: Tensor | None = None) -> None:
        """u2 with which the rows have their marginals a, from their pairs."""
        self._merge(a, u2, stop)

    def row_log_sums(self, v2: Tensor) -> Tensor:
        """log2 of the row sums [G, n] of 2^(entry + v2)."""
        items, rows, _ = self.scores.shape
        launch(
            kernels.row_step_kernel,
            (self.blocks, items, self.row_blocks),
            self.scores, v2, self.row_peaks, self.row_sums, *self.sizes, self.factor,
            **self.options,
        )  # fmt: skip
        sums = self.new(items, rows)
        self._merge(None, sums, None)
        return sums

    def _merge(self, a: Tensor | None, out: Tensor, stop: Tensor | None) -> None:
        items, rows, _ = self.scores.shape
        launch(
            kernels.merge_rows_kernel,
            (cdiv(rows, MERGE_TILE["BN"]), items),
            self.row_peaks, self.row_sums, a, out, stop,
            rows, self.blocks, 0 if a is None else item_stride(a),
            SCALE=a is not None,
            HAS_TOL=stop is not None,
            **MERGE_TILE,
        )  # fmt: skip

    def plan(self, u2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """2^(entry + u2 + v2) [G, n, K], and both potentials as natural logarithms."""
        plan, u, v = (self.new(*x.shape) for x in (self.scores, u2, v2))
        launch(
            kernels.plan_kernel,
            (self.blocks, self.scores.shape[0], self.row_blocks),
            self.scores, u2, v2, plan, u, v, *self.sizes, self.factor, 1 / LOG2E,
            **self.options,
        )  # fmt: skip
        return plan, u, v
