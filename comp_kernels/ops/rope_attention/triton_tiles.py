"""Steps shared by the Triton kernels of rope_attention: find a tile, load it, rotate it, update the softmax, store it.

A *tile* is a block of consecutive tokens of one sequence and one head. Triton tensors have power-of-two sides, so a tile in
registers is a tuple of *chunks* along the head dimension, [rows, 64] and [rows, 16] for 72 channels. `Head` and `Rope`
describe, at compile time, the head dimension and the rotary embedding.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Head(NamedTuple):
    """The head dimension."""

    dim: int
    chunks: tuple[tuple[int, int], ...]  # (first channel, width), widths are powers of two of at least 16
    align: int  # elements; divides every token and head stride, at most 16 bytes: lets the compiler use wide loads


class Rope(NamedTuple):
    """The rotary embedding. Pair j joins channels a = 2 p (j // p) + j % p and a + p, with p = pair_stride."""

    num_pairs: int  # rotary_dim / 2; 0: no rotation
    pair_stride: int
    half_table: bool  # the tables hold one value per pair, otherwise one per channel
    align: int  # elements; divides the strides of the tables, at most 16 bytes


# Arguments of the kernels that change from batch to batch. Triton compiles a kernel anew for each pattern of arguments that are
# 1 or divisible by 16, unless told not to; what the loads need to know of strides, `align` says above.
VARYING = (
    "num_sequences",
    "num_tokens",
    "num_tokens_k",
    "num_rows_of_all_heads",
    "cu_seqlens_ptr",  # may start anywhere: a view, and only single elements are read
    "cu_seqlens_k_ptr",
    "x_stride_h",  # of [H, T, D] layouts T * D
    "q_stride_h",
    "k_stride_h",
    "v_stride_h",
    "grad_stride_h",
    "table_stride_h",
    "table_k_stride_h",
)


# --- which tile --------------------------------------------------------------------------------------------------------------


@triton.jit
def find_tile(cu_seqlens_ptr, num_sequences, num_tokens, slot, BLOCK: tl.constexpr):
    """Which rows the program with index `slot` owns: (sequence, first packed row of it, first row in it, its length).

    Sequence b has the slots from cu[b] // BLOCK + b on, up to those of b + 1: at least as many as tiles. So the host can
    bound the number of slots, num_tokens // BLOCK + num_sequences + 1, without reading cu_seqlens; a slot without rows has
    first row >= length. The rows beyond the last sequence count as one more sequence, number num_sequences.
    """
    low = 0
    high = num_sequences + 1
    while high - low > 1:  # the last sequence whose first slot is at or before ours
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= slot:
            low = middle
        else:
            high = middle
    begin = tl.load(cu_seqlens_ptr + low)
    end = tl.load(cu_seqlens_ptr + low + 1, mask=low < num_sequences, other=num_tokens)
    first = (slot - begin // BLOCK - low) * BLOCK
    return low, begin, first, end - begin


@triton.jit
def sequence_bounds(cu_seqlens_ptr, num_sequences, sequence):
    """(first packed row, length) of a sequence; the one after the last is empty."""
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < num_sequences, other=begin)
    return begin, end - begin


# --- memory ------------------------------------------------------------------------------------------------------------------


@triton.jit
def offset(index, stride, ALIGN: tl.constexpr):
    """index * stride in 64 bits, for one index."""
    return tl.multiple_of(tl.cast(index, tl.int64) * stride, ALIGN)


@triton.jit
def tile_pointers(base, rows, stride, columns, ALIGN: tl.constexpr):
    """Addresses [rows, columns]. `rows` count within a tile, so that 32 bits hold rows * stride."""
    return base + tl.multiple_of(rows * stride, ALIGN)[:, None] + columns[None, :]


@triton.jit
def outer(rows, columns, TRANSPOSED: tl.constexpr):
    """`rows` and `columns` as the two sides of a tile [rows, columns], or [columns, rows]."""
    if TRANSPOSED:
        sides = rows[None, :], columns[:, None]
    else:
        sides = rows[:, None], columns[None, :]
    return sides


@triton.jit
def load_tile(base, rows, num_rows, stride, CHECK_ROWS: tl.constexpr, HEAD: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """The tile at `base`; zeros beyond the head dimension and, with CHECK_ROWS, from row num_rows on."""
    tile = ()
    for c in tl.static_range(len(HEAD.chunks)):
        columns = HEAD.chunks[c][0] + tl.arange(0, HEAD.chunks[c][1])
        row_offsets, column_offsets = outer(tl.multiple_of(rows * stride, tl.constexpr(HEAD.align)), columns, TRANSPOSED)
        keep_rows, keep_columns = outer(rows < num_rows, columns < HEAD.dim, TRANSPOSED)
        pointers = base + row_offsets + column_offsets
        if CHECK_ROWS:
            chunk = tl.load(pointers, mask=keep_rows & keep_columns, other=0.0)
        elif HEAD.chunks[c][0] + HEAD.chunks[c][1] > HEAD.dim:
            chunk = tl.load(pointers, mask=keep_columns, other=0.0)
        else:
            chunk = tl.load(pointers)
        tile = tile + (chunk,)
    return tile


@triton.jit
def transpose_tile(tile, HEAD: tl.constexpr):
    """Chunks [channels, rows]."""
    transposed = ()
    for c in tl.static_range(len(HEAD.chunks)):
        transposed = transposed + (tl.trans(tile[c]),)
    return transposed


@triton.jit
def load_both_ways(base, rows, num_rows, stride, CHECK_ROWS: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """(tile, its transpose).

    Where one product takes a tile as it is and another its transpose, 32-bit elements would need two arrangements in shared
    memory, and the compiler then copies through registers, nothing in advance. So the tile is loaded twice, once from cache.
    """
    tile = load_tile(base, rows, num_rows, stride, CHECK_ROWS, HEAD)
    if PRECISION == "tf32x3":
        transposed = load_tile(base, rows, num_rows, stride, CHECK_ROWS, HEAD, TRANSPOSED=True)
    else:
        transposed = transpose_tile(tile, HEAD)
    return tile, transposed


@triton.jit
def store_tile(base, tile, rows, num_rows, stride, HEAD: tl.constexpr):
    """Write the rows below num_rows of a tile, rounded to the dtype of the target."""
    for c in tl.static_range(len(HEAD.chunks)):
        columns = HEAD.chunks[c][0] + tl.arange(0, HEAD.chunks[c][1])
        mask = (rows < num_rows)[:, None] & (columns < HEAD.dim)[None, :]
        pointers = tile_pointers(base, rows, stride, columns, HEAD.align)
        tl.store(pointers, tile[c].to(base.dtype.element_ty), mask=mask)


# --- arithmetic on tiles -----------------------------------------------------------------------------------------------------


@triton.jit
def zero_tile(ROWS: tl.constexpr, HEAD: tl.constexpr):
    tile = ()
    for c in tl.static_range(len(HEAD.chunks)):
        tile = tile + (tl.zeros((ROWS, tl.constexpr(HEAD.chunks[c][1])), tl.float32),)
    return tile


@triton.jit
def scale_tile(tile, factor, HEAD: tl.constexpr):
    """tile times a number, or a column of numbers [rows, 1]."""
    scaled = ()
    for c in tl.static_range(len(HEAD.chunks)):
        scaled = scaled + (tile[c] * factor,)
    return scaled


@triton.jit
def split_tf32(x):
    """x as high + low, exactly: the 11 leading significant bits, rounded to nearest, and the rest."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def add_dot(accumulator, a, b, PRECISION: tl.constexpr):
    """accumulator + a times b, float32.

    "tf32x3": three TF32 products, all but low times low; an infinity in a or b becomes NaN. They join the accumulator by an
    addition of its own, because matrix units cut the sums that they form. tl.dot has the same under this name, but spends five
    more instructions per element on infinities.
    """
    if PRECISION == "tf32x3":
        a_high, a_low = split_tf32(a)
        b_high, b_low = split_tf32(b)
        product = tl.dot(a_low, b_high, input_precision="tf32")
        product = tl.dot(a_high, b_low, product, input_precision="tf32")
        return accumulator + tl.dot(a_high, b_high, product, input_precision="tf32")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def dot_channels(a, b, HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """a [M, D] times b [D, N]: [M, N], float32."""
    product = tl.zeros((a[0].shape[0], b[0].shape[1]), tl.float32)
    for c in tl.static_range(len(HEAD.chunks)):
        product = add_dot(product, a[c], b[c], PRECISION)
    return product


@triton.jit
def add_dot_rows(accumulator, weights, b, HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator [M, D] + weights [M, N] times b [N, D]."""
    result = ()
    for c in tl.static_range(len(HEAD.chunks)):
        result = result + (add_dot(accumulator[c], weights, b[c], PRECISION),)
    return result


@triton.jit
def online_softmax_update(scores, row_shift, row_sum, accumulator, scale_log2, HEAD: tl.constexpr):
    """Take the scores [M, N] of one more key tile into the running softmax of exp2(scores * scale_log2).

    row_shift: the largest score so far times scale_log2, rounded. The rounding is the same for all keys, so it cancels.
    Returns (weights [M, N], row_shift, row_sum, accumulator); the caller adds weights times values to the accumulator.
    """
    new_shift = tl.maximum(row_shift, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_shift[:, None])
    correction = tl.exp2(row_shift - new_shift)
    row_sum = row_sum * correction + tl.sum(weights, 1)
    return weights, new_shift, row_sum, scale_tile(accumulator, correction[:, None], HEAD)


# --- rotation ----------------------------------------------------------------------------------------------------------------


@triton.jit
def rotate_pair(a, b, cos_a, sin_a, cos_b, sin_b):
    """y = x * cos + swap(x) * sin for the two channels of each pair."""
    return a * cos_a - b * sin_a, b * cos_b + a * sin_b


@triton.jit
def rotate_pair_transposed(a, b, cos_a, sin_a, cos_b, sin_b):
    """The transpose of rotate_pair, through which gradients go back; its inverse only where the table is a rotation."""
    return a * cos_a + b * sin_b, b * cos_b - a * sin_a


@triton.jit
def grouped(columns, STRIDE: tl.constexpr):
    """Tell the compiler that `columns` come in aligned runs of the largest power of two, up to 8, that divides STRIDE."""
    RUN: tl.constexpr = min(STRIDE & -STRIDE, 8)
    return tl.max_contiguous(tl.multiple_of(columns, RUN), RUN)


@triton.jit
def load_pairs(base, rows, keep, stride, PAIRS: tl.constexpr, ALIGN: tl.constexpr, ROPE: tl.constexpr):
    """(a, b), each [rows, PAIRS] in float32: both channels of every pair; zeros where not `keep` [rows]."""
    if ROPE.pair_stride == 1:  # neighbours: one wide load, taken apart in registers
        channels = tl.arange(0, 2 * PAIRS)
        mask = keep[:, None] & (channels < 2 * ROPE.num_pairs)[None, :]
        both = tl.load(tile_pointers(base, rows, stride, channels, ALIGN), mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(both.reshape(rows.shape[0], PAIRS, 2))
    else:
        pairs = tl.arange(0, PAIRS)
        channels = grouped(pairs + pairs // ROPE.pair_stride * ROPE.pair_stride, ROPE.pair_stride)
        mask = keep[:, None] & (pairs < ROPE.num_pairs)[None, :]
        pointers = tile_pointers(base, rows, stride, channels, ALIGN)
        a = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(pointers + ROPE.pair_stride, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(base, a, b, rows, keep, stride, PAIRS: tl.constexpr, ALIGN: tl.constexpr, ROPE: tl.constexpr):
    """Write what load_pairs reads, rounded to the dtype of the target."""
    a, b = a.to(base.dtype.element_ty), b.to(base.dtype.element_ty)
    if ROPE.pair_stride == 1:
        channels = tl.arange(0, 2 * PAIRS)
        mask = keep[:, None] & (channels < 2 * ROPE.num_pairs)[None, :]
        both = tl.join(a, b).reshape(rows.shape[0], 2 * PAIRS)
        tl.store(tile_pointers(base, rows, stride, channels, ALIGN), both, mask=mask)
    else:
        pairs = tl.arange(0, PAIRS)
        channels = grouped(pairs + pairs // ROPE.pair_stride * ROPE.pair_stride, ROPE.pair_stride)
        mask = keep[:, None] & (pairs < ROPE.num_pairs)[None, :]
        pointers = tile_pointers(base, rows, stride, channels, ALIGN)
        tl.store(pointers, a, mask=mask)
        tl.store(pointers + ROPE.pair_stride, b, mask=mask)


@triton.jit
def load_table_pairs(base, rows, keep, stride, PAIRS: tl.constexpr, ROPE: tl.constexpr):
    """The values of a table for both channels of every pair."""
    if ROPE.half_table:
        pairs = tl.arange(0, PAIRS)
        mask = keep[:, None] & (pairs < ROPE.num_pairs)[None, :]
        a = tl.load(tile_pointers(base, rows, stride, pairs, ROPE.align), mask=mask, other=0.0)
        b = a
    else:
        a, b = load_pairs(base, rows, keep, stride, PAIRS, ROPE.align, ROPE)
    return a, b


@triton.jit
def swap_neighbours(x):
    """x [rows, width] with channels 2 j and 2 j + 1 exchanged, within a thread.

    tl.join would say it more simply, but after one the compiler arranges the operands of tl.dot for elements half as wide, and
    the loop of the forward kernel grows by 40 %.
    """
    pairs = x.reshape(x.shape[0], x.shape[1] // 2, 2)
    is_first = (tl.arange(0, 2) == 0)[None, None, :]
    first = tl.sum(tl.where(is_first, pairs, 0.0), 2, keep_dims=True)
    second = tl.sum(tl.where(is_first, 0.0, pairs), 2, keep_dims=True)
    return tl.where(is_first, second, first).reshape(x.shape[0], x.shape[1])


@triton.jit
def load_table_chunk(base, rows, keep, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, OTHER: tl.constexpr,
                     ROPE: tl.constexpr):  # fmt: skip
    """[rows, WIDTH], the values of a table for the channels from FIRST on; OTHER for those that do not turn."""
    if ROPE.half_table and ROPE.pair_stride == 1:  # a load per pair, both channels from it
        pairs = FIRST // 2 + tl.arange(0, WIDTH // 2)
        mask = keep[:, None] & (pairs < ROPE.num_pairs)[None, :]
        chunk = tl.load(tile_pointers(base, rows, stride, pairs, ROPE.align), mask=mask, other=OTHER)
        chunk = tl.broadcast_to(chunk[:, :, None], (rows.shape[0], WIDTH // 2, 2)).reshape(rows.shape[0], WIDTH)
    else:
        columns = FIRST + tl.arange(0, WIDTH)
        table_columns = columns
        if ROPE.half_table:
            block = columns // (2 * ROPE.pair_stride)
            is_first = columns - block * 2 * ROPE.pair_stride < ROPE.pair_stride
            table_columns = tl.where(is_first, columns, columns - ROPE.pair_stride) - block * ROPE.pair_stride
        pointers = tile_pointers(base, rows, stride, grouped(table_columns, ROPE.pair_stride), ROPE.align)
        chunk = tl.load(pointers, mask=keep[:, None] & (columns < 2 * ROPE.num_pairs)[None, :], other=OTHER)
    return chunk


@triton.jit
def load_rotated_chunk(base, rows, keep, stride, cos, sin, table_stride, FIRST: tl.constexpr, WIDTH: tl.constexpr,
                       HEAD: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """Channels FIRST to FIRST + WIDTH of `base`, rotated in float32 and rounded once; zeros where not `keep` [rows].

    The partner of a channel may lie in another chunk, so it is read from memory a second time (a cache hit), except for
    neighbours, which share a chunk.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    mask = keep[:, None] & (columns < HEAD.dim)[None, :]
    x = tl.load(tile_pointers(base, rows, stride, columns, HEAD.align), mask=mask, other=0.0)
    is_first = columns - columns // (2 * ROPE.pair_stride) * 2 * ROPE.pair_stride < ROPE.pair_stride
    if ROPE.pair_stride == 1:
        partner = swap_neighbours(x.to(tl.float32))
    else:
        partner_columns = grouped(tl.where(is_first, columns + ROPE.pair_stride, columns - ROPE.pair_stride), ROPE.pair_stride)
        mask = keep[:, None] & (columns < 2 * ROPE.num_pairs)[None, :]
        partner = tl.load(tile_pointers(base, rows, stride, partner_columns, HEAD.align), mask=mask, other=0.0).to(tl.float32)
    cos_here = load_table_chunk(cos, rows, keep, table_stride, FIRST, WIDTH, 1.0, ROPE)
    sin_here = load_table_chunk(sin, rows, keep, table_stride, FIRST, WIDTH, 0.0, ROPE)
    sin_here *= tl.where(is_first, -1.0, 1.0)[None, :]
    return (x.to(tl.float32) * cos_here + partner * sin_here).to(x.dtype)


@triton.jit
def load_rotated_tile(base, rows, num_rows, stride, cos, sin, table_stride, HEAD: tl.constexpr, ROPE: tl.constexpr):
    """The tile at `base` with its rotary channels turned, in the dtype of the source; rows from num_rows on are zero."""
    keep = rows < num_rows
    tile = ()
    for c in tl.static_range(len(HEAD.chunks)):
        if c > 0 and len(HEAD.chunks) > 2:
            tl.debug_barrier()  # or the compiler loads all chunks at once, and the registers do not hold them
        if HEAD.chunks[c][0] < 2 * ROPE.num_pairs:
            chunk = load_rotated_chunk(base, rows, keep, stride, cos, sin, table_stride, HEAD.chunks[c][0], HEAD.chunks[c][1],
                                       HEAD, ROPE)  # fmt: skip
        else:
            columns = HEAD.chunks[c][0] + tl.arange(0, HEAD.chunks[c][1])
            pointers = tile_pointers(base, rows, stride, columns, HEAD.align)
            chunk = tl.load(pointers, mask=keep[:, None] & (columns < HEAD.dim)[None, :], other=0.0)
        tile = tile + (chunk,)
    return tile
