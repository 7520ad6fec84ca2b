"""Triton kernels of alignment_loss: score products in the prototypes' own dtype, and loss and gradient over one score tile.

Names: i_* program index, o_* offsets, m_* mask, b_* block of values; BN rows, BK prototypes, BD channels of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..sinkhorn.triton_kernels import VARYING, multiple


@triton.jit(do_not_specialize=VARYING)
def products_kernel(
    features, prototypes, out,
    num_rows, num_cols, dim, prototype_stride, out_stride,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [n, C] = features [n, D] @ prototypes [C, D]^T in float32. Prototypes are widened in registers: there is no float32
    copy of them. Grid (blocks of rows, blocks of prototypes); neighbours share prototypes."""
    num_cols, out_stride = multiple(num_cols, ALIGN), multiple(out_stride, ALIGN)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_n, m_k = o_n < num_rows, o_k < num_cols
    features += o_n.to(tl.int64)[:, None] * dim
    prototypes += o_k.to(tl.int64)[:, None] * prototype_stride
    b_out = tl.zeros((BN, BK), tl.float32)
    for first in range(0, dim, BD):
        o_d = first + tl.arange(0, BD)
        m_d = (o_d < dim)[None, :]
        b_features = tl.load(features + o_d[None, :], mask=m_n[:, None] & m_d, other=0.0)
        b_prototypes = tl.load(prototypes + o_d[None, :], mask=m_k[:, None] & m_d, other=0.0).to(tl.float32)
        b_out = tl.dot(b_features, tl.trans(b_prototypes), b_out, input_precision=PRECISION)
    tl.store(out + o_n.to(tl.int64)[:, None] * out_stride + o_k[None, :], b_out, mask=m_n[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    score_gradients, prototypes, grad_features,
    num_rows, num_cols, dim, score_stride, prototype_stride,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """grad_features [n, D] += score_gradients [n, C] @ prototypes [C, D]. Grid (blocks of rows, blocks of channels): every
    program owns its part of the result, so the order of the sums is fixed."""
    num_cols, score_stride = multiple(num_cols, ALIGN), multiple(score_stride, ALIGN)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_n, m_d = o_n < num_rows, o_d < dim
    score_gradients += o_n.to(tl.int64)[:, None] * score_stride
    o_out = o_n.to(tl.int64)[:, None] * dim + o_d[None, :]
    m_out = m_n[:, None] & m_d[None, :]
    b_grad = tl.load(grad_features + o_out, mask=m_out, other=0.0)
    for first in range(0, num_cols, BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < num_cols
        b_scores = tl.load(score_gradients + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        o_prototypes = o_k.to(tl.int64)[:, None] * prototype_stride + o_d[None, :]
        b_prototypes = tl.load(prototypes + o_prototypes, mask=m_k[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_grad = tl.dot(b_scores, b_prototypes, b_grad, input_precision=PRECISION)
    tl.store(grad_features + o_out, b_grad, mask=m_out)


@triton.jit(do_not_specialize=VARYING)
def norms_kernel(
    prototypes, scales, num_cols, dim, prototype_stride, floor,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """scales [C] = 1 / max(norm of each prototype, floor). Grid (blocks of prototypes)."""
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    m_k = o_k < num_cols
    prototypes += o_k.to(tl.int64)[:, None] * prototype_stride
    squares = tl.zeros((BK, BD), tl.float32)
    for first in range(0, dim, BD):
        o_d = first + tl.arange(0, BD)
        x = tl.load(prototypes + o_d[None, :], mask=m_k[:, None] & (o_d < dim)[None, :], other=0.0).to(tl.float32)
        squares += x * x
    tl.store(scales + o_k, 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), floor), mask=m_k)


@triton.jit(do_not_specialize=VARYING)
def loss_tile_kernel(
    text, vision, col_scale, u2, v2, target_weight, peaks2, sums, row_weight, partial_loss2,
    num_rows, num_cols, text_stride, vision_stride, text_factor, vision_factor, grad_factor,
    HAS_COL_SCALE: tl.constexpr, HAS_V: tl.constexpr, GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial_loss2 [blocks, n]: - sum over the block of target log2 prediction. GRADIENT: vision scores become

        (prediction - target) * row_weight * grad_factor * col_scale

    with target = 2^(text + u2 + v2) * target_weight, prediction = 2^(vision - peaks2) / sums; scores in bits after col_scale
    and their factor. Grid (blocks of prototypes, blocks of rows)."""
    num_cols = multiple(num_cols, ALIGN)
    text_stride, vision_stride = multiple(text_stride, ALIGN), multiple(vision_stride, ALIGN)
    i_block = tl.program_id(0)
    o_n, o_k = tl.program_id(1) * BN + tl.arange(0, BN), i_block * BK + tl.arange(0, BK)
    m_n, m_k = o_n < num_rows, o_k < num_cols
    mask = m_n[:, None] & m_k[None, :]
    weight = tl.load(row_weight + o_n, mask=m_n, other=0.0)
    counts = weight > 0
    if HAS_COL_SCALE:
        scale = tl.load(col_scale + o_k, mask=m_k, other=0.0)
    else:
        scale = tl.full((BK,), 1.0, tl.float32)
    shift = tl.load(u2 + o_n, mask=m_n, other=-float("inf"))[:, None]
    if HAS_V:
        shift += tl.load(v2 + o_k, mask=m_k, other=-float("inf"))[None, :]
    b_text = tl.load(text + o_n.to(tl.int64)[:, None] * text_stride + o_k[None, :], mask=mask, other=0.0)
    b_target = tl.exp2(b_text * (scale * text_factor)[None, :] + shift)
    b_target = tl.where(mask & counts[:, None], b_target * tl.load(target_weight + o_n, mask=m_n, other=0.0)[:, None], 0.0)

    o_vision = o_n.to(tl.int64)[:, None] * vision_stride + o_k[None, :]
    total = tl.load(sums + o_n, mask=m_n, other=1.0)
    below_peak = tl.load(vision + o_vision, mask=mask, other=0.0) * (scale * vision_factor)[None, :]
    below_peak -= tl.load(peaks2 + o_n, mask=m_n, other=0.0)[:, None]
    loss = tl.sum(b_target * (tl.log2(total)[:, None] - below_peak), axis=1)
    tl.store(partial_loss2 + i_block * num_rows + o_n, loss, mask=m_n)
    if GRADIENT:
        b_grad = (tl.exp2(below_peak) / total[:, None] - b_target) * (weight * grad_factor)[:, None] * scale[None, :]
        tl.store(vision + o_vision, tl.where(counts[:, None], b_grad, 0.0), mask=mask)
