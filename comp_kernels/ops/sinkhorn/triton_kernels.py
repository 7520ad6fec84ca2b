"""Triton kernels of sinkhorn over matrices of scores [G, n, K] or one tile of columns; everything in base-2 logarithms.

One iteration is two launches and one read of the scores from device memory. `column_step_kernel` owns a block of columns: it
reduces the columns over all rows, scales them, and then, with the block still in the caches, takes each row's (maximum, sum)
over the block. `merge_rows_kernel` merges those pairs over the blocks and scales the rows.

Names: i_* program index, o_* offsets, m_* mask, BN rows and BK columns of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that change from batch to batch, of these kernels and those of alignment_loss. Triton compiles a kernel anew for
# each pattern of arguments that are 1 or divisible by 16, unless told not to. What wide loads need to know is in ALIGN: a power
# of two that divides the columns and the strides of the scores.
VARYING = (
    "num_rows",
    "num_cols",
    "num_blocks",
    "iteration",
    "item_stride",
    "row_stride",
    "a_item_stride",
    "b_item_stride",
    "out_stride",
    "score_stride",
    "text_stride",
    "vision_stride",
)


@triton.jit
def multiple(n, ALIGN: tl.constexpr):
    """n, which ALIGN divides, said so that the compiler knows."""
    return n // ALIGN * ALIGN


@triton.jit
def pair_stride(num_rows):
    """From the pairs of one block of columns to those of the next: wide loads for any number of rows."""
    return (num_rows + 15) // 16 * 16


@triton.jit
def finite_or_zero(x):
    """The shift to subtract before exp2: a maximum of -inf stands for no mass, and -inf - -inf is not wanted."""
    return tl.where(x > -float("inf"), x, 0.0)


@triton.jit
def merge_sums(peak, total, other_peak, other_total):
    """(maximum, sum of 2^(entry - maximum)) of two sets of entries together."""
    top = tl.maximum(peak, other_peak)
    shift = finite_or_zero(top)
    return top, total * tl.exp2(peak - shift) + other_total * tl.exp2(other_peak - shift)


@triton.jit
def merge_block(peak, total, row_peaks, row_sums, o_pair, mask):
    """The sums [BN] together with the pairs [BB, BN] at `o_pair`."""
    block_peaks = tl.load(row_peaks + o_pair, mask=mask, other=-float("inf"))
    block_sums = tl.load(row_sums + o_pair, mask=mask, other=0.0)
    top = tl.max(block_peaks, axis=0)
    block_total = tl.sum(block_sums * tl.exp2(block_peaks - finite_or_zero(top)[None, :]), axis=0)
    return merge_sums(peak, total, top, block_total)


@triton.jit
def load_marginals(marginals, offsets, mask, each):
    """Zeros outside; marginals is None: all are `each`."""
    if marginals is None:
        found = tl.where(mask, each, 0.0)
    else:
        found = tl.load(marginals + offsets, mask=mask, other=0.0)
    return found


@triton.jit
def load_entries(scores, o_n, o_k, m_n, m_k, row_stride, factor):
    """[BN, BK] entries in bits, -inf outside."""
    tile = tl.load(scores + o_n.to(tl.int64)[:, None] * row_stride + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
    return tl.where(m_n[:, None] & m_k[None, :], tile.to(tl.float32) * factor, -float("inf"))


@triton.jit(do_not_specialize=VARYING)
def column_step_kernel(
    scores, u, v, a, b, v_new, row_peaks, row_sums, col_peaks, col_sums, errors, stop,
    num_rows, num_cols, num_blocks, item_stride, row_stride, a_item_stride, b_item_stride, iteration, factor, col_share,
    ITERATE: tl.constexpr, HAS_TOL: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of columns, items). ITERATE: v_new [G, K], and row_peaks, row_sums [G, blocks, pair_stride] of the plan with
    scaled columns; iteration 0 starts from u = 0 in rows that have mass. Else col_peaks, col_sums [G, K]. HAS_TOL: nothing
    happens once *stop is set, and errors [G, blocks] receives the L1 error of the column sums as they were with v (infinite
    in iteration 0). a None: ones; b None: col_share each."""
    i_block, i_item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_TOL:
        if tl.load(stop) != 0:
            return
    num_cols, row_stride = multiple(num_cols, ALIGN), multiple(row_stride, ALIGN)
    o_k = i_block * BK + tl.arange(0, BK)
    m_k = o_k < num_cols
    scores += i_item * multiple(item_stride, ALIGN)
    u += i_item * num_rows

    peak = tl.full((BK,), -float("inf"), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    for first in range(0, num_rows, BN):
        o_n = first + tl.arange(0, BN)
        m_n = o_n < num_rows
        x = load_entries(scores, o_n, o_k, m_n, m_k, row_stride, factor)
        if ITERATE:
            mass = load_marginals(a, i_item * a_item_stride + o_n, m_n, 1.0)
            shift = tl.load(u + o_n, mask=o_n < num_rows * min(iteration, 1), other=0.0)
            shift = tl.where(mass > 0, shift, -float("inf"))
        else:
            shift = tl.load(u + o_n, mask=m_n, other=-float("inf"))
        x += shift[:, None]
        tile_peak = tl.max(x, axis=0)
        tile_total = tl.sum(tl.exp2(x - finite_or_zero(tile_peak)[None, :]), axis=0)
        peak, total = merge_sums(peak, total, tile_peak, tile_total)

    if not ITERATE:
        tl.store(col_peaks + i_item * num_cols + o_k, peak, mask=m_k)
        tl.store(col_sums + i_item * num_cols + o_k, total, mask=m_k)
    else:
        target = load_marginals(b, i_item * b_item_stride + o_k, m_k, col_share)
        log_sum = peak + tl.log2(total)
        if HAS_TOL:
            old = tl.load(v + i_item * num_cols + o_k, mask=o_k < num_cols * min(iteration, 1), other=float("inf"))
            sums = tl.where(target > 0, tl.exp2(log_sum + old), 0.0)
            tl.store(errors + i_item * num_blocks + i_block, tl.sum(tl.abs(sums - target)))
        scaled = tl.where(target > 0, tl.log2(target) - log_sum, -float("inf"))
        tl.store(v_new + i_item * num_cols + o_k, scaled, mask=m_k)

        # The block is read again, from the caches.
        row_peaks += (i_item * num_blocks + i_block) * pair_stride(num_rows)
        row_sums += (i_item * num_blocks + i_block) * pair_stride(num_rows)
        for first in range(0, num_rows, BN):
            o_n = first + tl.arange(0, BN)
            m_n = o_n < num_rows
            x = load_entries(scores, o_n, o_k, m_n, m_k, row_stride, factor) + scaled[None, :]
            row_peak = tl.max(x, axis=1)
            tl.store(row_peaks + o_n, row_peak, mask=m_n)
            tl.store(row_sums + o_n, tl.sum(tl.exp2(x - finite_or_zero(row_peak)[:, None]), axis=1), mask=m_n)


@triton.jit(do_not_specialize=VARYING)
def row_step_kernel(
    scores, v, row_peaks, row_sums,
    num_rows, num_cols, num_blocks, item_stride, row_stride, factor,
    ALIGN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """row_peaks, row_sums [G, blocks, pair_stride] of the entries plus v. Grid (blocks of columns, items, blocks of rows)."""
    i_block, i_item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_cols, row_stride = multiple(num_cols, ALIGN), multiple(row_stride, ALIGN)
    o_n, o_k = tl.program_id(2) * BN + tl.arange(0, BN), i_block * BK + tl.arange(0, BK)
    m_n, m_k = o_n < num_rows, o_k < num_cols
    x = load_entries(scores + i_item * multiple(item_stride, ALIGN), o_n, o_k, m_n, m_k, row_stride, factor)
    x += tl.load(v + i_item * num_cols + o_k, mask=m_k, other=-float("inf"))[None, :]
    row_peak = tl.max(x, axis=1)
    o_out = (i_item * num_blocks + i_block) * pair_stride(num_rows) + o_n
    tl.store(row_peaks + o_out, row_peak, mask=m_n)
    tl.store(row_sums + o_out, tl.sum(tl.exp2(x - finite_or_zero(row_peak)[:, None]), axis=1), mask=m_n)


@triton.jit(do_not_specialize=VARYING)
def merge_rows_kernel(
    row_peaks, row_sums, a, out, stop,
    num_rows, num_blocks, a_item_stride,
    SCALE: tl.constexpr, HAS_TOL: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """out [G, n] = log2 of the sum of the pairs [G, blocks, pair_stride] over the blocks; SCALE: the potential that makes it
    a (None: ones). Grid (blocks of rows, items)."""
    i_item = tl.program_id(1).to(tl.int64)
    if HAS_TOL:
        if tl.load(stop) != 0:
            return
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < num_rows
    stride = pair_stride(num_rows)
    row_peaks += i_item * num_blocks * stride
    row_sums += i_item * num_blocks * stride
    peak = tl.full((BN,), -float("inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, num_blocks, BB):
        o_b = first + tl.arange(0, BB)
        mask = (o_b < num_blocks)[:, None] & (o_n < stride)[None, :]  # what no row wrote is read, and goes nowhere
        o_pair = o_b[:, None] * stride + o_n[None, :]
        peak, total = merge_block(peak, total, row_peaks, row_sums, o_pair, mask)
    found = peak + tl.log2(total)
    if SCALE:
        mass = load_marginals(a, i_item * a_item_stride + o_n, m_n, 1.0)
        found = tl.where(mass > 0, tl.log2(mass) - found, -float("inf"))
    tl.store(out + i_item * num_rows + o_n, found, mask=m_n)


@triton.jit(do_not_specialize=VARYING)
def plan_kernel(
    scores, u, v, plan, u_out, v_out,
    num_rows, num_cols, num_blocks, item_stride, row_stride, factor, unit,
    ALIGN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """plan [G, n, K] = 2^(entry + u + v), u_out [G, n] = u * unit, v_out [G, K] = v * unit. Grid (blocks of columns, items,
    blocks of rows)."""
    i_block, i_item, i_rows = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_cols, row_stride = multiple(num_cols, ALIGN), multiple(row_stride, ALIGN)
    o_n, o_k = i_rows * BN + tl.arange(0, BN), i_block * BK + tl.arange(0, BK)
    m_n, m_k = o_n < num_rows, o_k < num_cols
    u2 = tl.load(u + i_item * num_rows + o_n, mask=m_n, other=-float("inf"))
    v2 = tl.load(v + i_item * num_cols + o_k, mask=m_k, other=-float("inf"))
    if i_block == 0:
        tl.store(u_out + i_item * num_rows + o_n, u2 * unit, mask=m_n)
    if i_rows == 0:
        tl.store(v_out + i_item * num_cols + o_k, v2 * unit, mask=m_k)
    x = load_entries(scores + i_item * multiple(item_stride, ALIGN), o_n, o_k, m_n, m_k, row_stride, factor)
    x = x + u2[:, None] + v2[None, :]
    out = plan + i_item * num_rows * num_cols + o_n.to(tl.int64)[:, None] * num_cols + o_k[None, :]
    tl.store(out, tl.exp2(x), mask=m_n[:, None] & m_k[None, :])
