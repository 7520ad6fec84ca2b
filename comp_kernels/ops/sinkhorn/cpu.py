"""sinkhorn on the CPU: allocates the results and calls csrc/cpu."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
import torch.distributed as dist
from torch import Tensor

from ... import _native
from ..._native import pointer
from . import small
from .over_group import solve_over_group

LOG2E = 1.0 / math.log(2.0)


class SolveParams(ctypes.Structure):
    """comp_kernels_sinkhorn_params of csrc/include/comp_kernels/sinkhorn.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "row_marginals", "col_marginals", "u", "v", "plan")),
        *((name, ctypes.c_int64) for name in ("item_stride", "row_stride", "row_marginals_stride", "col_marginals_stride")),
        *((name, ctypes.c_int64) for name in ("num_items", "num_rows", "num_cols", "num_iters")),
        ("factor", ctypes.c_double),
        ("tol", ctypes.c_double),
        ("dtype", ctypes.c_int64),
    ]


class StepParams(ctypes.Structure):
    """comp_kernels_sinkhorn_step_params of the same header."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "col_scale", "col_marginals", "u2", "v2", "v2_new", "row_sums")),
        *((name, ctypes.c_void_p) for name in ("largest_weight", "peaks", "sums", "plan")),
        *((name, ctypes.c_int64) for name in ("row_stride", "num_rows", "num_cols")),
        ("factor", ctypes.c_double),
        ("dtype", ctypes.c_int64),
    ]


def unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu backend needs tensors on the cpu, not on {device}"
    return _native.cpu_unavailable_reason()


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
    """scores [G, n, K] with the last dimension contiguous, marginals [n] or [G, n] and [K] or [G, K], contiguous, of the
    computing dtype. Returns (P [G, n, K], u [G, n], v [G, K])."""
    compute = row_marginals.dtype
    plan = scores.new_empty(scores.shape, dtype=compute)
    if group is not None:
        return _solve_over_group(scores, row_marginals, col_marginals, plan, LOG2E / epsilon, num_iters, tol, group)
    items, rows, cols = scores.shape
    u, v = scores.new_empty((items, rows), dtype=compute), scores.new_empty((items, cols), dtype=compute)
    solve_into(plan, u, v, scores, row_marginals, col_marginals, epsilon=epsilon, num_iters=num_iters, tol=tol)
    return plan, u, v


def solve_into(
    plan: Tensor,
    u: Tensor,
    v: Tensor,
    scores: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    *,
    epsilon: float,
    num_iters: int,
    tol: float | None,
) -> None:
    """The same into memory that is there: plan [G, n, K], u [G, n], v [G, K], contiguous, of the computing dtype."""
    items, rows, cols = scores.shape
    params = SolveParams(
        scores=scores.data_ptr(),
        row_marginals=row_marginals.data_ptr(),
        col_marginals=col_marginals.data_ptr(),
        u=u.data_ptr(),
        v=v.data_ptr(),
        plan=plan.data_ptr(),
        item_stride=scores.stride(0),
        row_stride=scores.stride(1),
        row_marginals_stride=rows if row_marginals.dim() == 2 else 0,
        col_marginals_stride=cols if col_marginals.dim() == 2 else 0,
        num_items=items,
        num_rows=rows,
        num_cols=cols,
        num_iters=num_iters,
        factor=LOG2E / epsilon,
        tol=-1.0 if tol is None else tol,
        dtype=_native.DTYPE_CODES[scores.dtype],
    )
    _native.cpu_function("sinkhorn_solve", SolveParams)(params)


def _call_small(function: str, params: small.SmallParams, scores: Tensor) -> None:
    _native.cpu_function(function, small.SmallParams)(params)


solve_small = functools.partial(small.solve, _call_small)
small_gradient = functools.partial(small.gradient, _call_small)


def _solve_over_group(scores, row_marginals, col_marginals, plan, factor, num_iters, tol, group):
    def columns(u2: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [column_statistics(item, factor, u) for item, u in zip(scores, u2)]
        return torch.stack([peaks for peaks, _ in pairs]), torch.stack([sums for _, sums in pairs])

    def rows(v2: Tensor) -> Tensor:
        peaks = v2.new_full(scores.shape[:2], -torch.inf)
        sums = torch.zeros_like(peaks)
        for item, v, peak, total in zip(scores, v2, peaks, sums):
            update_row_statistics(item, factor, peak, total, v)
        return peaks + sums.log2()

    row_marginals, col_marginals = (x.expand(scores.shape[0], -1) for x in (row_marginals, col_marginals))
    u2, v2 = solve_over_group(columns, rows, row_marginals, col_marginals, num_iters=num_iters, tol=tol, group=group)
    for item, u, v, out in zip(scores, u2, v2, plan):
        call_step("plan", item, factor, u2=u, v2=v, plan=out)
    return plan, u2 / LOG2E, v2 / LOG2E


def column_statistics(scores: Tensor, factor: float, u2: Tensor, col_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per column of one matrix [n, K], over its rows: the largest entry in bits and the sum of 2^(entry - largest)."""
    peaks, sums = u2.new_full((scores.shape[1],), -torch.inf), u2.new_zeros(scores.shape[1])  # of no rows: no mass
    call_step("column_statistics", scores, factor, col_scale=col_scale, u2=u2, peaks=peaks, sums=sums)
    return peaks, sums


def update_row_statistics(
    scores: Tensor, factor: float, peaks: Tensor, sums: Tensor, v2: Tensor | None = None, col_scale: Tensor | None = None
) -> None:
    """Merge the entries of each row [n, K] into peaks and sums [n], which start as -inf and 0."""
    call_step("row_statistics", scores, factor, col_scale=col_scale, v2=v2, peaks=peaks, sums=sums)


def call_step(function: str, scores: Tensor, factor: float, **tensors: Tensor | None) -> None:
    """One of the C functions over one matrix [n, K]; `tensors` are the fields of StepParams by name."""
    if scores.numel() == 0:
        return
    params = StepParams(
        scores=scores.data_ptr(),
        row_stride=scores.stride(0),
        num_rows=scores.shape[0],
        num_cols=scores.shape[1],
        factor=factor,
        dtype=_native.DTYPE_CODES[scores.dtype],
        **{name: pointer(x) for name, x in tensors.items()},
    )
    _native.cpu_function(f"sinkhorn_{function}", StepParams)(params)
