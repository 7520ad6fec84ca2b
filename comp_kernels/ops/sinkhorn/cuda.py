"""sinkhorn on NVIDIA GPUs by the hand-written kernels of csrc/sinkhorn/cuda: float32, bfloat16 and float16 scores."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer
from ..._units import LOG2E
from .._log_domain.over_group import group_by_name, solve_over_group
from . import small
from .call import Call
from .native import SolveParams


def unavailable_reason(device: torch.device) -> str | None:
    return _native.cuda_unavailable_reason(device)


def declines(call: Call) -> str | None:
    return "the CUDA kernels have no float64" if call.scores.dtype == torch.float64 else small.declines(call)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """P, u and v of a flat call."""
    if small.serves(call):
        return small.solve(_run_small, call)
    scores = call.scores
    plan, u, v = call.new_results()
    params = SolveParams.of(call, plan, u, v)
    size = _native.cuda_function("sinkhorn_workspace", (ctypes.c_void_p,), ctypes.c_int64)
    workspace = scores.new_empty(size(ctypes.byref(params)), dtype=torch.uint8)
    if call.group is None and (call.tol is None or split(params) is not None):
        _launch("solve", scores, params, workspace)
        return plan, u, v

    def column_statistics(u2: Tensor) -> tuple[Tensor, Tensor]:
        peaks, sums = torch.empty_like(v), torch.empty_like(v)
        _launch("columns", scores, params, u2.contiguous(), peaks, sums, workspace)
        return peaks, sums

    def row_log_sums(v2: Tensor) -> Tensor:
        row_sums = torch.empty_like(u)
        _launch("rows", scores, params, v2.contiguous(), row_sums)
        return row_sums

    marginals = (x.expand_as(potential) for x, potential in zip(call.marginals(), (u, v)))
    group = group_by_name(call.group)
    u2, v2 = solve_over_group(
        column_statistics, row_log_sums, *marginals, num_iters=call.num_iters, tol=call.tol, group=group
    )  # fmt: skip
    _launch("plan", scores, params, u2.contiguous(), v2.contiguous())
    return plan, u2 / LOG2E, v2 / LOG2E


class Split(NamedTuple):
    """How the one launch of a solve is split over the current device, see comp_kernels_cuda_sinkhorn_split."""

    blocks_per_item: int
    items_at_a_time: int
    tile_columns: int
    shared_bytes: int  # per block
    score_bytes: int  # of them for scores, which stay there over the iterations
    merged_by_all: int
    nanoseconds: int  # by the model of csrc/sinkhorn/cuda/split.h


def split(params: SolveParams) -> Split | None:
    """None where several launches serve the problem; they know no tol."""
    numbers = (ctypes.c_int64 * len(Split._fields))()
    _native.cuda_function("sinkhorn_split", (ctypes.c_void_p, ctypes.c_void_p), None)(ctypes.byref(params), numbers)
    found = Split(*numbers)
    return found if found.blocks_per_item else None


def _run_small(function: str, params: small.SmallParams, scores: Tensor) -> None:
    workspace: list[Tensor | None] = []
    if function.endswith("backward"):
        size = _native.cuda_function("sinkhorn_small_workspace", (ctypes.c_void_p,), ctypes.c_int64)
        count = size(ctypes.byref(params))
        workspace.append(scores.new_empty(count // 4, dtype=torch.float32) if count else None)
    _launch(function.removeprefix("sinkhorn_"), scores, params, *workspace)


def small_gradient(call: Call, *cotangents: Tensor | None) -> Tensor:
    """Of the scores of small matrices, from those of plan, u and v: see small.gradient."""
    return small.gradient(_run_small, call, *cotangents)


def _launch(which: str, scores: Tensor, params: ctypes.Structure, *tensors: Tensor | None) -> None:
    """One of the C functions on the current stream of the scores' device; `tensors` are its pointer arguments in order."""
    function = _native.cuda_function(f"sinkhorn_{which}", (ctypes.c_void_p,) * (2 + len(tensors)))
    with _native.on_device(scores):
        _native.call(function, params, *(pointer(x) for x in tensors), _native.stream(scores))
