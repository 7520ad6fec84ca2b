"""sinkhorn over many small matrices in Triton: one launch forward, one backward, tiles and scratch memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._triton import cdiv, launch, next_power_of_2
from ..._units import LOG2E
from . import small
from .call import Call, item_stride

NUM_WARPS = 4
TILE = 1024  # entries per program, 8 a thread: twice as many spill two registers in the backward pass


def tile_of(second: int, first: int) -> dict[str, int]:
    """Items and sides of a tile, padded to powers of two."""
    sides = dict(BS=next_power_of_2(second), BF=next_power_of_2(first))
    return dict(BG=max(1, TILE // (sides["BS"] * sides["BF"])), **sides)


def solve(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """As small.solve, without float64."""
    from .triton_small_kernels import small_forward_kernel

    scores = small.contiguous_items(call.scores)
    plan, u, v = call.new_results()
    sides = _Sides(scores, call)
    second, first = (u, v) if call.order == "cols_rows" else (v, u)
    launch(
        small_forward_kernel,
        (sides.programs,),
        scores, *sides.marginals, plan, second, first,
        *sides.numbers, call.num_iters, LOG2E / call.epsilon, call.eps,
        HAS_EPS=call.eps > 0,
        **sides.tile,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return plan, u, v


def gradient(call: Call, grad_plan: Tensor | None, grad_u: Tensor | None, grad_v: Tensor | None) -> Tensor:
    """As small.gradient, without float64. Scratch memory: num_iters + 1 vectors per side and matrix."""
    from .triton_small_kernels import small_backward_kernel

    scores = small.contiguous_items(call.scores)
    sides = _Sides(scores, call)
    found = torch.empty_like(scores, memory_format=torch.contiguous_format)
    programs, tile = sides.programs, sides.tile
    history = (call.num_iters + 1, programs * tile["BG"])
    xs, ws = (scores.new_empty((*history, tile[side]), dtype=torch.float32) for side in ("BS", "BF"))
    grad_second, grad_first = (grad_u, grad_v) if call.order == "cols_rows" else (grad_v, grad_u)
    launch(
        small_backward_kernel,
        (programs,),
        scores, *sides.marginals, grad_plan, grad_second, grad_first, xs, ws, found,
        *sides.numbers, call.num_iters, LOG2E / call.epsilon, call.eps, 1.0 / call.epsilon,
        HAS_EPS=call.eps > 0,
        HAS_GRAD_PLAN=grad_plan is not None,
        HAS_GRAD_U=grad_second is not None,
        HAS_GRAD_V=grad_first is not None,
        **tile,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return found


class _Sides:
    """The arguments of a call by the side that is scaled second and the one that is scaled first."""

    def __init__(self, scores: Tensor, call: Call):
        *batch, rows, cols = scores.shape
        items = math.prod(batch)
        # entries, their stride in a matrix, marginals, and what each of these is where they are None
        pairs = ((rows, cols, call.row_marginals, 1.0), (cols, 1, call.col_marginals, rows / cols))
        (second, s_stride, a, a_each), (first, f_stride, b, b_each) = pairs if call.order == "cols_rows" else pairs[::-1]
        self.marginals = (a, b)
        self.tile = tile_of(second, first)
        self.programs = cdiv(items, self.tile["BG"])
        strides = (scores.stride(0) if batch else 0, s_stride, f_stride, item_stride(a), item_stride(b))
        self.numbers = (items, second, first, *strides, a_each, b_each)
