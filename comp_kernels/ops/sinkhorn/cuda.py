"""sinkhorn on NVIDIA GPUs by the hand-written kernels of csrc/cuda: float32, bfloat16 and float16 scores."""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.distributed as dist
from torch import Tensor

from ... import _native
from ..._native import pointer
from . import small
from .cpu import LOG2E, SolveParams
from .over_group import solve_over_group


def unavailable_reason(device: torch.device) -> str | None:
    return _native.cuda_unavailable_reason(device)


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
    items, rows, cols = scores.shape
    plan = scores.new_empty(scores.shape, dtype=torch.float32)
    params = SolveParams(
        scores=scores.data_ptr(),
        plan=plan.data_ptr(),
        item_stride=scores.stride(0),
        row_stride=scores.stride(1),
        num_items=items,
        num_rows=rows,
        num_cols=cols,
        num_iters=num_iters,
        factor=LOG2E / epsilon,
        tol=-1.0,
        dtype=_native.DTYPE_CODES[scores.dtype],
    )
    size = _native.cuda().comp_kernels_cuda_sinkhorn_workspace
    size.argtypes, size.restype = [ctypes.c_void_p], ctypes.c_int64
    workspace = scores.new_empty(size(ctypes.byref(params)), dtype=torch.uint8)
    if tol is None and group is None:
        u, v = plan.new_empty((items, rows)), plan.new_empty((items, cols))
        params.u, params.v = u.data_ptr(), v.data_ptr()
        params.row_marginals, params.col_marginals = row_marginals.data_ptr(), col_marginals.data_ptr()
        params.row_marginals_stride = rows if row_marginals.dim() == 2 else 0
        params.col_marginals_stride = cols if col_marginals.dim() == 2 else 0
        _launch("solve", scores, params, workspace)
        return plan, u, v

    def column_statistics(u2: Tensor) -> tuple[Tensor, Tensor]:
        peaks, sums = plan.new_empty((items, cols)), plan.new_empty((items, cols))
        _launch("columns", scores, params, u2.contiguous(), peaks, sums, workspace)
        return peaks, sums

    def row_log_sums(v2: Tensor) -> Tensor:
        row_sums = plan.new_empty((items, rows))
        _launch("rows", scores, params, v2.contiguous(), row_sums)
        return row_sums

    marginals = (x.expand(items, -1) for x in (row_marginals, col_marginals))
    u2, v2 = solve_over_group(column_statistics, row_log_sums, *marginals, num_iters=num_iters, tol=tol, group=group)
    _launch("plan", scores, params, u2.contiguous(), v2.contiguous())
    return plan, u2 / LOG2E, v2 / LOG2E


def _call_small(function: str, params: small.SmallParams, scores: Tensor) -> None:
    workspace = ()
    if function.endswith("backward"):
        size = _native.cuda().comp_kernels_cuda_sinkhorn_small_workspace
        size.argtypes, size.restype = [ctypes.c_void_p], ctypes.c_int64
        count = size(ctypes.byref(params))
        workspace = (scores.new_empty(count // 4, dtype=torch.float32) if count else None,)
    _launch(function.removeprefix("sinkhorn_"), scores, params, *workspace)


solve_small = functools.partial(small.solve, _call_small)
small_gradient = functools.partial(small.gradient, _call_small)


def _launch(which: str, scores: Tensor, params: ctypes.Structure, *tensors: Tensor | None) -> None:
    """One of the C functions on the current stream of the scores' device; `tensors` are its pointer arguments in order."""
    function = getattr(_native.cuda(), f"comp_kernels_cuda_sinkhorn_{which}")
    function.argtypes, function.restype = [ctypes.c_void_p] * (2 + len(tensors)), ctypes.c_char_p
    with torch.cuda.device_of(scores):
        _native.call(function, params, *(pointer(x) for x in tensors), _native.stream(scores.device))
