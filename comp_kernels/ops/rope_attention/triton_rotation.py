"""Triton kernels that rotate rows in memory: q or k into a workspace, gradients in place together with those of the tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import cdiv, launch, next_power_of_2
from .triton_tiles import (
    VARYING,
    Head,
    Rope,
    load_pairs,
    load_table_pairs,
    offset,
    rotate_pair,
    rotate_pair_transposed,
    store_pairs,
    tile_pointers,
)

ROWS = 16  # tokens per program
HEADS = 4  # heads per program of the rotation: the table is read once for them


@triton.jit(do_not_specialize=VARYING)
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, cu_seqlens_ptr, out_ptr,
    num_sequences, num_heads, x_stride_h, table_stride_h,
    X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, TAIL: tl.constexpr, PADDED: tl.constexpr,
    PER_HEAD: tl.constexpr, HEAD: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """out [T, H, PADDED] = rotated x [T, H, D], zeros from channel D on. One program: ROWS tokens, HEADS heads."""
    first = tl.program_id(0) * ROWS
    num_rows = tl.load(cu_seqlens_ptr + num_sequences) - first  # rows beyond the last sequence are never read
    if num_rows <= 0:
        return
    rows = tl.arange(0, ROWS)
    keep = rows < num_rows
    x_base = x_ptr + offset(first, X_STRIDE, HEAD.align)
    out_base = out_ptr + offset(first, OUT_STRIDE, 16)
    cos_base = cos_ptr + offset(first, TABLE_STRIDE, ROPE.align)
    sin_base = sin_ptr + offset(first, TABLE_STRIDE, ROPE.align)
    cos_a, cos_b = load_table_pairs(cos_base, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
    sin_a, sin_b = load_table_pairs(sin_base, rows, keep, TABLE_STRIDE, PAIRS, ROPE)

    first_head = tl.program_id(1) * HEADS
    for head in range(first_head, min(first_head + HEADS, num_heads)):
        x = x_base + offset(head, x_stride_h, HEAD.align)
        out = out_base + head * PADDED
        if PER_HEAD:
            table = offset(head, table_stride_h, ROPE.align)
            cos_a, cos_b = load_table_pairs(cos_base + table, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
            sin_a, sin_b = load_table_pairs(sin_base + table, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
        a, b = load_pairs(x, rows, keep, X_STRIDE, PAIRS, HEAD.align, ROPE)
        a, b = rotate_pair(a, b, cos_a, sin_a, cos_b, sin_b)
        store_pairs(out, a, b, rows, keep, OUT_STRIDE, PAIRS, 16, ROPE)
        if 2 * ROPE.num_pairs < PADDED:  # channels that pass through, and the padding
            tail = 2 * ROPE.num_pairs + tl.arange(0, TAIL)
            is_channel = keep[:, None] & (tail < HEAD.dim)[None, :]
            rest = tl.load(tile_pointers(x, rows, X_STRIDE, tail, HEAD.align), mask=is_channel, other=0.0)
            is_padded = keep[:, None] & (tail < PADDED)[None, :]
            tl.store(tile_pointers(out, rows, OUT_STRIDE, tail, 16), rest, mask=is_padded)


@triton.jit
def unrotate_in_place(grad, num_rows, cos, sin, GRAD_STRIDE: tl.constexpr, TABLE_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
                      PAIRS: tl.constexpr, ALIGN: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """Apply the transposed rotation to the rows of one tile of gradients in memory, sixteen at a time.

    Both channels of a pair are read and written by one thread, so no other copy is needed. All arguments point at the tile.
    """
    for first in range(0, BLOCK, 16):
        rows = first + tl.arange(0, 16)
        keep = rows < num_rows
        cos_a, cos_b = load_table_pairs(cos, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
        sin_a, sin_b = load_table_pairs(sin, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
        a, b = load_pairs(grad, rows, keep, GRAD_STRIDE, PAIRS, ALIGN, ROPE)
        a, b = rotate_pair_transposed(a, b, cos_a, sin_a, cos_b, sin_b)
        store_pairs(grad, a, b, rows, keep, GRAD_STRIDE, PAIRS, ALIGN, ROPE)


@triton.jit(do_not_specialize=VARYING)
def unrotate_kernel(
    grad_ptr, x_ptr, cos_ptr, sin_ptr, grad_cos_ptr, grad_sin_ptr, cu_seqlens_ptr,
    num_sequences, num_tokens, num_heads,
    x_stride_h, table_stride_h,
    GRAD_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, PER_HEAD: tl.constexpr, HEAD: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """grad [T, H, D]: gradient of rotated x -> gradient of x, in place; and the gradients of the tables.

    One program: ROWS tokens, all heads one after the other, so the sum over heads of a shared table has a fixed order.
    """
    first = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    keep = rows < tl.load(cu_seqlens_ptr + num_sequences) - first
    keep_table = rows < num_tokens - first  # rows beyond the last sequence get zeros
    x_base = x_ptr + offset(first, X_STRIDE, HEAD.align)
    grad_base = grad_ptr + offset(first, GRAD_STRIDE, HEAD.align)
    table = offset(first, TABLE_STRIDE, ROPE.align)
    cos_a, cos_b = load_table_pairs(cos_ptr + table, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
    sin_a, sin_b = load_table_pairs(sin_ptr + table, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
    grad_cos_a = tl.zeros((ROWS, PAIRS), tl.float32)
    grad_cos_b = grad_cos_a
    grad_sin_a = grad_cos_a
    grad_sin_b = grad_cos_a
    for head in range(num_heads):
        grad = grad_base + head * HEAD.dim
        if PER_HEAD:
            here = table + offset(head, table_stride_h, ROPE.align)
            cos_a, cos_b = load_table_pairs(cos_ptr + here, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
            sin_a, sin_b = load_table_pairs(sin_ptr + here, rows, keep, TABLE_STRIDE, PAIRS, ROPE)
        a, b = load_pairs(x_base + offset(head, x_stride_h, HEAD.align), rows, keep, X_STRIDE, PAIRS, HEAD.align, ROPE)
        grad_a, grad_b = load_pairs(grad, rows, keep, GRAD_STRIDE, PAIRS, HEAD.align, ROPE)
        if PER_HEAD:
            store_table_gradient(grad_cos_ptr + here, grad_a * a, grad_b * b, rows, keep_table, TABLE_STRIDE, PAIRS, ROPE)
            store_table_gradient(grad_sin_ptr + here, -grad_a * b, grad_b * a, rows, keep_table, TABLE_STRIDE, PAIRS, ROPE)
        else:
            grad_cos_a += grad_a * a
            grad_cos_b += grad_b * b
            grad_sin_a -= grad_a * b
            grad_sin_b += grad_b * a
        grad_a, grad_b = rotate_pair_transposed(grad_a, grad_b, cos_a, sin_a, cos_b, sin_b)
        store_pairs(grad, grad_a, grad_b, rows, keep, GRAD_STRIDE, PAIRS, HEAD.align, ROPE)
    if not PER_HEAD:
        store_table_gradient(grad_cos_ptr + table, grad_cos_a, grad_cos_b, rows, keep_table, TABLE_STRIDE, PAIRS, ROPE)
        store_table_gradient(grad_sin_ptr + table, grad_sin_a, grad_sin_b, rows, keep_table, TABLE_STRIDE, PAIRS, ROPE)


@triton.jit
def store_table_gradient(base, a, b, rows, keep, stride, PAIRS: tl.constexpr, ROPE: tl.constexpr):
    """The gradient of a table from those of the two channels of each pair."""
    if ROPE.half_table:
        pairs = tl.arange(0, PAIRS)
        mask = keep[:, None] & (pairs < ROPE.num_pairs)[None, :]
        tl.store(tile_pointers(base, rows, stride, pairs, ROPE.align), a + b, mask=mask)
    else:
        store_pairs(base, a, b, rows, keep, stride, PAIRS, ROPE.align, ROPE)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, head: Head, rope: Rope) -> Tensor:
    """Rotated x [T, H, D] as [T, H, D rounded up to 16], contiguous; rows beyond the last sequence are left unwritten."""
    padded = sum(width for _, width in head.chunks)
    out = torch.empty(*x.shape[:2], padded, dtype=x.dtype, device=x.device)
    grid = (cdiv(x.shape[0], ROWS), cdiv(x.shape[1], HEADS))
    launch(
        rotate_kernel, grid,
        x, cos, sin, cu_seqlens, out,
        cu_seqlens.shape[0] - 1, x.shape[1], x.stride(1), head_stride(cos),
        X_STRIDE=x.stride(0), OUT_STRIDE=out.stride(0), TABLE_STRIDE=token_stride(cos),
        ROWS=ROWS, HEADS=HEADS, PAIRS=next_power_of_2(rope.num_pairs),
        TAIL=next_power_of_2(padded - 2 * rope.num_pairs), PADDED=padded,
        PER_HEAD=cos.dim() == 3, HEAD=head, ROPE=rope,
        num_warps=4,
    )  # fmt: skip
    return out


def unrotate(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, head: Head, rope: Rope
) -> tuple[Tensor, Tensor]:
    """Turn grad [T, H, D], contiguous, from the gradient of rotated x into that of x, in place; return (dcos, dsin)."""
    grad_cos, grad_sin = torch.empty_like(cos), torch.empty_like(sin)
    launch(
        unrotate_kernel, (cdiv(x.shape[0], ROWS),),
        grad, x, cos, sin, grad_cos, grad_sin, cu_seqlens,
        cu_seqlens.shape[0] - 1, x.shape[0], x.shape[1],
        x.stride(1), head_stride(cos), GRAD_STRIDE=grad.stride(0), X_STRIDE=x.stride(0), TABLE_STRIDE=token_stride(cos),
        ROWS=ROWS, PAIRS=next_power_of_2(rope.num_pairs), PER_HEAD=cos.dim() == 3, HEAD=head, ROPE=rope,
        num_warps=4,
    )  # fmt: skip
    return grad_cos, grad_sin


def token_stride(table: Tensor | None) -> int:
    """Elements from one token of a table to the next."""
    return 0 if table is None else table.stride(0)


def head_stride(table: Tensor | None) -> int:
    """Elements from one head's table to the next; 0 when the heads share one."""
    return 0 if table is None or table.dim() == 2 else table.stride(1)
