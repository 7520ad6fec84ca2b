"""The shared steps over one matrix of scores on the CPU, by csrc/sinkhorn/cpu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ... import _native
from ..._native import pointer


class StepParams(ctypes.Structure):
    """comp_kernels_sinkhorn_step_params of the same header."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "col_scale", "col_marginals", "u2", "v2", "v2_new", "row_sums")),
        *((name, ctypes.c_void_p) for name in ("largest_weight", "peaks", "sums", "plan")),
        *((name, ctypes.c_int64) for name in ("row_stride", "num_rows", "num_cols")),
        ("factor", ctypes.c_double),
        ("dtype", ctypes.c_int64),
    ]


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
    _native.cpu_function(f"sinkhorn_{function}")(params)
