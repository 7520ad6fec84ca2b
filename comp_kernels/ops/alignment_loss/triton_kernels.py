"""Triton kernels of alignment_loss: what lies between the matrix products, in few passes over large pieces of the scores.

A score in bits is product * row_scale_i * col_scale_k * factor; row_scale is one over the norm of a feature row that was
multiplied as the user gave it, col_scale one over the norm of a prototype. Sums over rows or columns are pairs (maximum, sum of
2^(entry - maximum)), as in sinkhorn's kernels.

Names: i_* program index, o_* offsets, m_* mask, b_* block of values; BN rows, BK prototypes, BD channels, BB pairs of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..sinkhorn.triton_kernels import VARYING, finite_or_zero, merge_block, merge_sums, multiple

# What changes with every batch: no kernel is compiled again for it.
SIZES = (*VARYING, "first_block", "gradient_stride", "term_stride")


@triton.jit
def load_tile(scores, o_n, o_k, m_n, m_k, row_stride, row_factor, col_factor):
    """[BN, BK] entries in bits, -inf outside."""
    mask = m_n[:, None] & m_k[None, :]
    b_scores = tl.load(scores + o_n.to(tl.int64)[:, None] * row_stride + o_k[None, :], mask=mask, other=0.0)
    return tl.where(mask, b_scores * row_factor[:, None] * col_factor[None, :], -float("inf"))


@triton.jit
def load_factor(scale, offsets, mask, factor, SIZE: tl.constexpr, HAS_SCALE: tl.constexpr):
    """[SIZE] scale * factor; factor alone without scales."""
    if HAS_SCALE:
        return tl.load(scale + offsets, mask=mask, other=0.0) * factor
    else:
        return tl.full((SIZE,), 1.0, tl.float32) * factor


@triton.jit
def length_of(squares, small_squares, down):
    """(factor, length of the row times factor): the factor is 1, or `down` where the squares are beyond the range."""
    too_long = squares == float("inf")
    return tl.where(too_long, down, 1.0), tl.sqrt(tl.where(too_long, small_squares, squares))


@triton.jit
def power_of_two_below(x):
    """The largest power of two that is at most x, of a positive normal number."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def load_row(vision, text, o_d, is_text, mask):
    """Channels of a row of one of them, in float32."""
    if is_text:
        x = tl.load(text + o_d, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.load(vision + o_d, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=SIZES)
def count_rows_kernel(valid, count, weight, start, num_rows, HAS_VALID: tl.constexpr, BN: tl.constexpr):
    """count [1] = valid rows; weight [n] = 1 / count for them, else 0; start [n] = 0 for them, else -inf. One program."""
    b_count = tl.zeros((BN,), tl.float32)
    for first in range(0, num_rows, BN):
        b_count += valid_rows(valid, first + tl.arange(0, BN), num_rows, HAS_VALID)
    total = tl.sum(b_count)
    tl.store(count, total)
    for first in range(0, num_rows, BN):
        o_n = first + tl.arange(0, BN)
        counts = valid_rows(valid, o_n, num_rows, HAS_VALID)
        tl.store(weight + o_n, counts / tl.maximum(total, 1.0), mask=o_n < num_rows)
        tl.store(start + o_n, tl.where(counts > 0, 0.0, -float("inf")), mask=o_n < num_rows)


@triton.jit
def valid_rows(valid, o_n, num_rows, HAS_VALID: tl.constexpr):
    """1.0 for rows that count, 0.0 for others."""
    counts = o_n < num_rows
    if HAS_VALID:
        counts = tl.load(valid + o_n, mask=counts, other=0) != 0
    return tl.where(counts, 1.0, 0.0)


@triton.jit(do_not_specialize=SIZES)
def features_kernel(
    vision, text, valid, rows, row_scale, inverse_length,
    num_rows, dim, vision_stride, text_stride, floor, down,
    HAS_VALID: tl.constexpr, NORMALIZE: tl.constexpr, RAW: tl.constexpr, TERMS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """rows [2 n, TERMS D], vision above text [n, D], the smallest term first: of length one, or RAW as they are but for a power
    of two, and then row_scale [2 n] makes their length one. inverse_length [2 n]: one over the lengths that they had, 0 for
    rows that do not count or have no direction. Grid (n, 2)."""
    i_row, is_text = tl.program_id(0).to(tl.int64), tl.program_id(1) == 1
    i_out = tl.program_id(1) * num_rows + i_row
    readable = dim  # channels; a row that does not count is not read
    if HAS_VALID:
        readable = tl.where(tl.load(valid + i_row) != 0, dim, 0)
    vision += i_row * vision_stride
    text += i_row * text_stride
    factor, inverse, scale = 1.0, 1.0, 1.0
    if NORMALIZE:
        squares, small_squares = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
        for first in range(0, dim, BD):
            o_d = first + tl.arange(0, BD)
            x = load_row(vision, text, o_d, is_text, o_d < readable)
            squares += x * x
            small_squares += (x * down) * (x * down)
        total, small_total = tl.sum(squares), tl.sum(small_squares)
        factor, length = length_of(total, small_total, down)
        none = length <= floor  # NaN is not
        inverse = tl.where(none, 0.0, factor / length)
        if RAW:
            power = 1024.0 / power_of_two_below(tl.where(none, 1.0, length))  # float16 is finest up there
            scale = tl.where(none, 0.0, 1.0 / (length * power))
            factor = tl.where(none, 0.0, factor * power)
        else:
            factor = tl.where(none, 0.0, factor)
            scale = tl.where(none, 0.0, 1.0 / length)
    for first in range(0, dim, BD):
        o_d = first + tl.arange(0, BD)
        m_d = o_d < dim
        x = load_row(vision, text, o_d, is_text, o_d < readable) * factor
        if NORMALIZE and not RAW:
            x = x * scale
        for term in tl.static_range(TERMS):
            part = x.to(rows.dtype.element_ty)
            tl.store(rows + (i_out * TERMS + TERMS - 1 - term) * dim + o_d, part, mask=m_d)
            x = x - part.to(tl.float32)
    if RAW:
        tl.store(row_scale + i_out, scale)
    tl.store(inverse_length + i_out, tl.where(readable > 0, inverse, 0.0))


@triton.jit(do_not_specialize=SIZES)
def norms_kernel(
    prototypes, scales, num_cols, dim, prototype_stride, floor, down,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """scales [C] = 1 / norm of each prototype, 0 for norms up to floor. Grid (blocks of prototypes)."""
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    m_k = o_k < num_cols
    prototypes += o_k.to(tl.int64)[:, None] * prototype_stride
    squares, small_squares = tl.zeros((BK, BD), tl.float32), tl.zeros((BK, BD), tl.float32)
    for first in range(0, dim, BD):
        o_d = first + tl.arange(0, BD)
        x = tl.load(prototypes + o_d[None, :], mask=m_k[:, None] & (o_d < dim)[None, :], other=0.0).to(tl.float32)
        squares += x * x
        small_squares += (x * down) * (x * down)
    factor, length = length_of(tl.sum(squares, axis=1), tl.sum(small_squares, axis=1), down)
    # A norm beyond the largest number has no scale that could be multiplied by: NaN, not a cosine of zero.
    beyond = (factor < 1.0) & (length / factor == float("inf"))
    scale = tl.where(length <= floor, 0.0, factor / length)
    tl.store(scales + o_k, tl.where(beyond, float("nan"), scale), mask=m_k)


@triton.jit(do_not_specialize=SIZES)
def row_pairs_kernel(
    scores, row_scale, col_scale, v, row_peaks, row_sums,
    num_rows, num_cols, first_block, row_stride, factor,
    HAS_ROW_SCALE: tl.constexpr, HAS_COL_SCALE: tl.constexpr, HAS_V: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """row_peaks, row_sums [blocks, n] from first_block on, of entries plus v over COLUMNS columns. Grid (blocks, of rows)."""
    num_cols, row_stride = multiple(num_cols, ALIGN), multiple(row_stride, ALIGN)
    i_block = tl.program_id(0)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < num_rows
    row_factor = load_factor(row_scale, o_n, m_n, factor, BN, HAS_ROW_SCALE)
    peak, total = tl.full((BN,), -float("inf"), tl.float32), tl.zeros((BN,), tl.float32)
    begin = i_block * COLUMNS
    for first in range(begin, min(begin + COLUMNS, num_cols), BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < num_cols
        x = load_tile(
            scores, o_n, o_k, m_n, m_k, row_stride, row_factor, load_factor(col_scale, o_k, m_k, 1.0, BK, HAS_COL_SCALE)
        )
        if HAS_V:
            x += tl.load(v + o_k, mask=m_k, other=-float("inf"))[None, :]
        tile_peak = tl.max(x, axis=1)
        tile_total = tl.sum(tl.exp2(x - finite_or_zero(tile_peak)[:, None]), axis=1)
        peak, total = merge_sums(peak, total, tile_peak, tile_total)
    o_out = (first_block + i_block).to(tl.int64) * num_rows + o_n
    tl.store(row_peaks + o_out, peak, mask=m_n)
    tl.store(row_sums + o_out, total, mask=m_n)


@triton.jit(do_not_specialize=SIZES)
def columns_kernel(
    scores, row_scale, col_scale, u, targets, v, row_peaks, row_sums, col_peaks, col_sums,
    num_rows, num_cols, first_block, row_stride, factor,
    HAS_ROW_SCALE: tl.constexpr, HAS_COL_SCALE: tl.constexpr, ITERATE: tl.constexpr,
    ALIGN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """ITERATE: v [C] scales the columns to their targets, and row_peaks, row_sums [blocks, n] from first_block on are the pairs
    of the rows after that, for which the block is read again, from the caches. Else col_peaks, col_sums [C]. Grid (blocks)."""
    num_cols, row_stride = multiple(num_cols, ALIGN), multiple(row_stride, ALIGN)
    i_block = tl.program_id(0)
    o_k = i_block * BK + tl.arange(0, BK)
    m_k = o_k < num_cols
    col_factor = load_factor(col_scale, o_k, m_k, 1.0, BK, HAS_COL_SCALE)
    peak, total = tl.full((BK,), -float("inf"), tl.float32), tl.zeros((BK,), tl.float32)
    for first in range(0, num_rows, BN):
        o_n = first + tl.arange(0, BN)
        m_n = o_n < num_rows
        row_factor = load_factor(row_scale, o_n, m_n, factor, BN, HAS_ROW_SCALE)
        x = load_tile(scores, o_n, o_k, m_n, m_k, row_stride, row_factor, col_factor)
        x += tl.load(u + o_n, mask=m_n, other=-float("inf"))[:, None]
        tile_peak = tl.max(x, axis=0)
        tile_total = tl.sum(tl.exp2(x - finite_or_zero(tile_peak)[None, :]), axis=0)
        peak, total = merge_sums(peak, total, tile_peak, tile_total)
    if not ITERATE:
        tl.store(col_peaks + o_k, peak, mask=m_k)
        tl.store(col_sums + o_k, total, mask=m_k)
    else:
        target = tl.load(targets + o_k, mask=m_k, other=0.0)
        scaled = tl.where(target == 0, -float("inf"), tl.log2(target) - (peak + tl.log2(total)))
        tl.store(v + o_k, scaled, mask=m_k)
        row_peaks += (first_block + i_block).to(tl.int64) * num_rows
        row_sums += (first_block + i_block).to(tl.int64) * num_rows
        for first in range(0, num_rows, BN):
            o_n = first + tl.arange(0, BN)
            m_n = o_n < num_rows
            row_factor = load_factor(row_scale, o_n, m_n, factor, BN, HAS_ROW_SCALE)
            x = load_tile(scores, o_n, o_k, m_n, m_k, row_stride, row_factor, col_factor) + scaled[None, :]
            row_peak = tl.max(x, axis=1)
            tl.store(row_peaks + o_n, row_peak, mask=m_n)
            tl.store(row_sums + o_n, tl.sum(tl.exp2(x - finite_or_zero(row_peak)[:, None]), axis=1), mask=m_n)


@triton.jit(do_not_specialize=SIZES)
def merge_pairs_kernel(
    row_peaks, row_sums, valid, peaks, sums, u,
    num_rows, num_blocks,
    SCALE: tl.constexpr, HAS_VALID: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Merge the pairs [blocks, n] over the blocks, into peaks, sums [n], or with SCALE into u [n] = - log2 of the sum, -inf for
    rows that do not count. Grid (blocks of rows)."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < num_rows
    peak, total = tl.full((BN,), -float("inf"), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(0, num_blocks, BB):
        o_b = first + tl.arange(0, BB)
        mask = (o_b < num_blocks)[:, None] & m_n[None, :]
        o_pair = o_b.to(tl.int64)[:, None] * num_rows + o_n[None, :]
        peak, total = merge_block(peak, total, row_peaks, row_sums, o_pair, mask)
    if SCALE:
        scaled = -(peak + tl.log2(total))
        if HAS_VALID:
            scaled = tl.where(tl.load(valid + o_n, mask=m_n, other=0) != 0, scaled, -float("inf"))
        tl.store(u + o_n, scaled, mask=m_n)
    else:
        tl.store(peaks + o_n, peak, mask=m_n)
        tl.store(sums + o_n, total, mask=m_n)


@triton.jit(do_not_specialize=SIZES)
def loss_kernel(
    text, vision, score_gradients, row_scale_text, row_scale_vision, col_scale,
    u, v, target_weight, peaks, sums, row_weight, losses,
    num_rows, num_cols, first_block, text_stride, vision_stride, gradient_stride, term_stride,
    text_factor, vision_factor, grad_factor,
    HAS_ROW_SCALE: tl.constexpr, HAS_COL_SCALE: tl.constexpr, HAS_V: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr, TERMS: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """losses [blocks, n] from first_block on: - sum over COLUMNS columns of target log2 prediction, with

        target = 2^(text + u + v) * target_weight      prediction = 2^(vision - peaks) / sums      scores in bits

    GRADIENT: score_gradients [TERMS, n, C] = (prediction - target) * row_weight * grad_factor * col_scale; they may lie over
    the vision scores. Grid (blocks, blocks of rows)."""
    num_cols, text_stride, vision_stride = (
        multiple(num_cols, ALIGN),
        multiple(text_stride, ALIGN),
        multiple(vision_stride, ALIGN),
    )
    i_block = tl.program_id(0)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < num_rows
    weight = tl.load(row_weight + o_n, mask=m_n, other=0.0)
    counts = weight > 0
    text_rows = load_factor(row_scale_text, o_n, m_n, text_factor, BN, HAS_ROW_SCALE)
    vision_rows = load_factor(row_scale_vision, o_n, m_n, vision_factor, BN, HAS_ROW_SCALE)
    shift = tl.load(u + o_n, mask=m_n, other=-float("inf"))
    if HAS_WEIGHT:
        mass = tl.load(target_weight + o_n, mask=m_n, other=0.0)
    else:
        mass = tl.full((BN,), 1.0, tl.float32)
    peak, total = tl.load(peaks + o_n, mask=m_n, other=0.0), tl.load(sums + o_n, mask=m_n, other=1.0)
    log_total = tl.log2(total)
    loss = tl.zeros((BN, BK), tl.float32)
    begin = i_block * COLUMNS
    for first in range(begin, min(begin + COLUMNS, num_cols), BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < num_cols
        mask = m_n[:, None] & m_k[None, :]
        scale = load_factor(col_scale, o_k, m_k, 1.0, BK, HAS_COL_SCALE)
        b_shift = tl.broadcast_to(shift[:, None], (BN, BK))
        if HAS_V:
            b_shift += tl.load(v + o_k, mask=m_k, other=-float("inf"))[None, :]
        b_target = tl.exp2(load_tile(text, o_n, o_k, m_n, m_k, text_stride, text_rows, scale) + b_shift) * mass[:, None]
        b_target = tl.where(mask & counts[:, None], b_target, 0.0)
        below_peak = load_tile(vision, o_n, o_k, m_n, m_k, vision_stride, vision_rows, scale) - peak[:, None]
        loss += tl.where(mask & counts[:, None], b_target * (log_total[:, None] - below_peak), 0.0)
        if GRADIENT:
            b_grad = (tl.exp2(below_peak) / total[:, None] - b_target) * (weight * grad_factor)[:, None] * scale[None, :]
            b_grad = tl.where(counts[:, None], b_grad, 0.0)
            o_grad = o_n.to(tl.int64)[:, None] * gradient_stride + o_k[None, :]
            for term in tl.static_range(TERMS):
                part = b_grad.to(score_gradients.dtype.element_ty)
                tl.store(score_gradients + term * term_stride + o_grad, part, mask=mask)
                b_grad = b_grad - part.to(tl.float32)
    tl.store(losses + (first_block + i_block).to(tl.int64) * num_rows + o_n, tl.sum(loss, axis=1), mask=m_n)


@triton.jit(do_not_specialize=SIZES)
def total_kernel(
    losses, row_weight, total, num_rows, num_blocks, bit,
    BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """total [1] = bit * sum over rows of row_weight * sum of losses [blocks, n] over the blocks, in float64. One program."""
    b_total = tl.zeros((BB, BN), tl.float64)
    for first_row in range(0, num_rows, BN):
        o_n = first_row + tl.arange(0, BN)
        m_n = o_n < num_rows
        weight = tl.load(row_weight + o_n, mask=m_n, other=0.0).to(tl.float64)
        for first in range(0, num_blocks, BB):
            o_b = first + tl.arange(0, BB)
            mask = (o_b < num_blocks)[:, None] & m_n[None, :]
            b_losses = tl.load(losses + o_b.to(tl.int64)[:, None] * num_rows + o_n[None, :], mask=mask, other=0.0)
            b_total += b_losses.to(tl.float64) * weight[None, :]
    tl.store(total, (tl.sum(tl.sum(b_total, axis=1), axis=0) * bit).to(tl.float32))


@triton.jit(do_not_specialize=SIZES)
def through_length_kernel(
    gradients, rows, row_scale, inverse_length, out,
    num_rows, dim, row_stride,
    HAS_ROW_SCALE: tl.constexpr, HAS_INVERSE: tl.constexpr, HAS_ROWS: tl.constexpr,
    ROW_TERMS: tl.constexpr, TERMS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [n, D] = inverse_length (g - e (e . g)): the gradient through e = x / |x|, with g the sum of gradients [TERMS, n, D]
    and e that of rows [n, ROW_TERMS D] times row_scale. Without rows: inverse_length g. Grid (n)."""
    i_row = tl.program_id(0).to(tl.int64)
    term_stride = num_rows.to(tl.int64) * dim
    gradients += i_row * dim
    if HAS_ROWS:
        rows += i_row * row_stride
    along = tl.zeros((BD,), tl.float32)
    scale = tl.load(row_scale + i_row) if HAS_ROW_SCALE else 1.0
    inverse = tl.load(inverse_length + i_row) if HAS_INVERSE else 1.0
    if HAS_ROWS:
        for first in range(0, dim, BD):
            o_d = first + tl.arange(0, BD)
            g = sum_of_terms(gradients + (TERMS - 1) * term_stride, -term_stride, o_d, dim, TERMS)
            along += g * (sum_of_terms(rows, dim, o_d, dim, ROW_TERMS) * scale)
    projection = tl.sum(along)
    for first in range(0, dim, BD):
        o_d = first + tl.arange(0, BD)
        g = sum_of_terms(gradients + (TERMS - 1) * term_stride, -term_stride, o_d, dim, TERMS)
        if HAS_ROWS:
            g -= (sum_of_terms(rows, dim, o_d, dim, ROW_TERMS) * scale) * projection
        tl.store(out + i_row * dim + o_d, g * inverse, mask=o_d < dim)


@triton.jit
def sum_of_terms(x, term_stride, o_d, dim, TERMS: tl.constexpr):
    """[BD] sum of the terms of a row at x, the smallest, and term_stride from it on."""
    total = tl.zeros(o_d.shape, tl.float32)
    for term in tl.static_range(TERMS):
        total += tl.load(x + term * term_stride + o_d, mask=o_d < dim, other=0.0).to(tl.float32)
    return total
