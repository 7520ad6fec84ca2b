"""sinkhorn in Triton: allocates results and scratch, chooses tiles, launches triton_kernels. Nothing waits for the device."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ... import _triton
from ..._triton import launch
from .over_group import solve_over_group

LOG2E = 1.0 / math.log(2.0)
NUM_WARPS = 4
MERGE_TILE = dict(BN=32, BB=32)


def unavailable_reason(device: torch.device) -> str | None:
    return _triton.unavailable_reason(device)


def column_tile(num_rows: int, num_cols: int) -> dict[str, int]:
    """Rows and columns per tile of 4096 elements: wide enough for full memory transactions, small enough for many programs."""
    rows = min(max(16, 1 << (max(num_rows, 1) - 1).bit_length()), 64)
    return dict(BN=rows, BK=min(4096 // rows, max(16, 1 << (max(num_cols, 1) - 1).bit_length())))


def solve(
    scores: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    *,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.solve, without float64."""
    factor = LOG2E / epsilon
    if group is None:
        u2, v2 = _iterate(scores, row_marginals, col_marginals, factor, num_iters, tol)
    else:
        items = scores.shape[0]
        u2, v2 = solve_over_group(
            lambda u2: column_statistics(scores, factor, u2),
            lambda v2: _row_log_sums(scores, factor, v2),
            row_marginals.expand(items, -1),
            col_marginals.expand(items, -1),
            num_iters=num_iters,
            tol=tol,
            group=group,
        )
    return plan(scores, factor, u2, v2), u2 / LOG2E, v2 / LOG2E


def _iterate(scores, row_marginals, col_marginals, factor: float, num_iters: int, tol: float | None) -> tuple[Tensor, Tensor]:
    items, rows, cols = scores.shape
    a, b = row_marginals, col_marginals
    u2 = torch.where(a > 0, 0.0, -torch.inf).expand(items, rows).contiguous()
    v2 = v2_new = scores.new_empty((items, cols), dtype=torch.float32)
    stop = errors = None
    if tol is not None:
        # The error after an iteration is known once the next one has summed the columns; that one must then leave no trace.
        v2_new = torch.empty_like(v2)
        stop = torch.zeros((), dtype=torch.int32, device=scores.device)
        errors = scores.new_zeros((items, num_blocks(rows, cols)), dtype=torch.float32)
        allowed = tol * a.sum(-1)
    for iteration in range(num_iters):
        first = iteration == 0
        pairs = column_step(scores, factor, u2, v2, b, v2_new, errors=errors, stop=stop, first=first)
        if tol is not None and not first:
            stop |= (errors.sum(-1) <= allowed).all()
        merge_rows(*pairs, a=a, u2=u2, stop=stop)
        if tol is not None:
            v2 = torch.where(stop > 0, v2, v2_new)
    return u2, v2


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
    from .triton_kernels import column_step_kernel

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
    from .triton_kernels import row_step_kernel

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
    from .triton_kernels import merge_rows_kernel

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


def _row_log_sums(scores: Tensor, factor: float, v2: Tensor) -> Tensor:
    peaks = v2.new_full(scores.shape[:2], -torch.inf)
    sums = torch.zeros_like(peaks)
    merge_rows(*row_pairs(scores, factor, v2), peaks=peaks, sums=sums)
    return peaks + sums.log2()


def plan(scores: Tensor, factor: float, u2: Tensor, v2: Tensor) -> Tensor:
    """[G, n, K] = 2^(entry + u2 + v2)."""
    from .triton_kernels import plan_kernel

    items, rows, cols = scores.shape
    out = scores.new_empty(scores.shape, dtype=torch.float32)
    tile = column_tile(rows, cols)
    launch(
        plan_kernel,
        (num_blocks(rows, cols), items, -(-rows // tile["BN"])),
        scores, u2, v2, out,
        rows, cols, scores.stride(0), scores.stride(1), factor,
        **tile,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
