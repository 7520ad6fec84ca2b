"""Triton kernels of sinkhorn over many small matrices: a program holds a tile of them in registers for all iterations.

Tiles are [BG, BS, BF]: items, entries of the side that is scaled second, entries of the side that is scaled first. The
iterations are those of csrc/sinkhorn/cpu/kernels/small_linear.h on scalings of one matrix, and where a matrix of the tile spans
too many bits, those of small_logs.h as well, which then count for that matrix alone: no result depends on neighbours.

Names: i_* program index, o_* offsets, m_* mask; a, b marginals and x, w scalings of the second and the first side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import _units
from .triton_kernels import finite_or_zero, load_marginals

# As in csrc/sinkhorn/cpu/kernels/small.cpp: within these, every product of the linear iterations is a normal number.
SCORE_BITS = tl.constexpr(48.0)
MARGINAL_RATIO = tl.constexpr(1048576.0)
INFINITY = tl.constexpr(float("inf"))
LN2 = tl.constexpr(_units.LN2)


@triton.jit
def load_vector(base, items, o_s, o_f, mask, item_stride, each, axis: tl.constexpr):
    """A vector per item, [BG, BS] for axis 2 and [BG, BF] for axis 1; zeros outside; base None: all `each`. Made
    as part of a tile and summed, it lies where the sums over that axis will, and no iteration moves it."""
    if axis == 2:
        o_tile = items[:, None, None] * item_stride + o_s[None, :, None] + 0 * o_f[None, None, :]
        first = o_f[None, None, :] == 0
    else:
        o_tile = items[:, None, None] * item_stride + 0 * o_s[None, :, None] + o_f[None, None, :]
        first = o_s[None, :, None] == 0
    return tl.sum(load_marginals(base, o_tile, mask & first, each), axis=axis)


@triton.jit
def evenly_spread(marginals, m):
    """[BG]: whether the positive marginals, of which there must be some, lie close enough together; NaN do not."""
    most = tl.max(marginals, axis=1)
    least = tl.min(tl.where((marginals == 0) | ~m, INFINITY, marginals), axis=1)
    total = tl.sum(marginals, axis=1)
    return (most <= least * MARGINAL_RATIO) & (total < INFINITY) & (least < INFINITY)


@triton.jit
def ratio(numerator, denominator, m):
    """numerator / denominator, 0 in the padding."""
    return tl.where(m, numerator / tl.where(m, denominator, 1.0), 0.0)


@triton.jit
def load_problem(
    scores, items, o_s, o_f, mask, item_stride, s_stride, f_stride, factor, HAS_EPS: tl.constexpr
):  # fmt: skip
    """(raw, e, shift, spread): scores; 2^(score - maximum), 0 in the padding; maximum and spread of each matrix, in bits. The
    maximum subtracted is that of the matrix, with eps that of each softmax."""
    o_tile = items[:, None, None] * item_stride + o_s[None, :, None] * s_stride + o_f[None, None, :] * f_stride
    raw = tl.load(scores + o_tile, mask=mask, other=0.0).to(tl.float32)
    highest = tl.max(tl.where(mask, raw, -INFINITY), axis=1)  # [BG, BF]
    lowest = tl.min(tl.min(tl.where(mask, raw, INFINITY), axis=2), axis=1)
    top = tl.max(highest, axis=1)
    if HAS_EPS:
        peak = highest[:, None, :]
    else:
        peak = top[:, None, None]
    e = tl.where(mask, tl.exp2((raw - peak) * factor), 0.0)
    return raw, e, top * factor, (top - lowest) * factor


@triton.jit
def softmax_over_second(e, has_mass):
    """Zeros for an entry of the first side without mass, whose scores may be anything (-inf all of them, say)."""
    sums = tl.where(has_mass, tl.sum(e, axis=1), 1.0)
    return tl.where(has_mass[:, None, :], e / sums[:, None, :], 0.0)


@triton.jit
def linear_iterations(
    e, a, b, m_s, m_f, eps, xs, ws, o_xs, o_ws, xs_stride, ws_stride, num_iters,
    HAS_EPS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """(x [BG, BS], w [BG, BF]) after the iterations. KEEP: those after iteration t go to xs + o_xs + t xs_stride, ws + .."""
    x = tl.where((a == 0) | ~m_s, 0.0, 1.0)
    w = b
    if KEEP:
        tl.store(xs + o_xs, x)
        tl.store(ws + o_ws, w)
    for iteration in range(num_iters):
        sums = tl.sum(x[:, :, None] * e, axis=1)
        if HAS_EPS:
            w = tl.where(iteration == 0, w, ratio(w * b, w * sums + eps, m_f))
        else:
            w = ratio(b, sums, m_f)
        sums_of_f = tl.sum(e * w[:, None, :], axis=2)
        if HAS_EPS:
            x = ratio(x * a, x * sums_of_f + eps, m_s)
        else:
            x = ratio(a, sums_of_f, m_s)
        if KEEP:
            tl.store(xs + o_xs + (iteration + 1) * xs_stride, x)
            tl.store(ws + o_ws + (iteration + 1) * ws_stride, w)
    return x, w


@triton.jit
def log_sum(entries, axis: tl.constexpr):
    peak = tl.max(entries, axis=axis)
    shift = finite_or_zero(peak)
    return tl.log2(tl.sum(tl.exp2(entries - tl.expand_dims(shift, axis)), axis=axis)) + shift


@triton.jit
def potential(marginal, log_of_sum):
    return tl.where(marginal == 0, -INFINITY, tl.log2(marginal) - log_of_sum)


@triton.jit
def log_iterations(
    bits, a, b, us, vs, o_us, o_vs, us_stride, vs_stride, num_iters, KEEP: tl.constexpr
):  # fmt: skip
    """(u [BG, BS], v [BG, BF]) in bits, for entries of any size."""
    u = tl.where(a == 0, -INFINITY, 0.0)
    v = tl.where(b == 0, -INFINITY, 0.0)
    if KEEP:
        tl.store(us + o_us, u)
    for iteration in range(num_iters):
        v = potential(b, log_sum(bits + u[:, :, None], 1))
        u = potential(a, log_sum(bits + v[:, None, :], 2))
        if KEEP:
            tl.store(us + o_us + (iteration + 1) * us_stride, u)
            tl.store(vs + o_vs + (iteration + 1) * vs_stride, v)
    return u, v


@triton.jit
def shares(entries, axis: tl.constexpr):
    """Softmax of entries in bits, which sums to one however many bits its potentials were rounded at."""
    peak = tl.expand_dims(tl.max(entries, axis=axis), axis)
    weights = tl.exp2(entries - finite_or_zero(peak))
    return weights / tl.expand_dims(tl.sum(weights, axis=axis), axis)


@triton.jit
def log_plan(bits, a, v):
    return tl.where((a == 0)[:, :, None], 0.0, a[:, :, None] * shares(bits + v[:, None, :], 2))


@triton.jit
def small_forward_kernel(
    scores, a_marginals, b_marginals, plan, u, v,
    num_items, num_s, num_f, item_stride, s_stride, f_stride, a_stride, b_stride, a_each, b_each, num_iters, factor, eps,
    HAS_EPS: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """plan [G, n, K], u [G, S], v [G, F] (potentials of the second and the first side). Grid (tiles of items,)."""
    items = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    o_s, o_f = tl.arange(0, BS), tl.arange(0, BF)
    m_g = items < num_items
    m_s, m_f = m_g[:, None] & (o_s < num_s)[None, :], m_g[:, None] & (o_f < num_f)[None, :]
    mask = m_s[:, :, None] & m_f[:, None, :]
    raw, e, shift, spread = load_problem(scores, items, o_s, o_f, mask, item_stride, s_stride, f_stride, factor, HAS_EPS)
    a = load_vector(a_marginals, items, o_s, o_f, mask, a_stride, a_each, 2)
    b = load_vector(b_marginals, items, o_s, o_f, mask, b_stride, b_each, 1)
    if HAS_EPS:
        e = tl.where(mask, softmax_over_second(e, m_f & (b != 0)) + eps, 0.0)
    x, w = linear_iterations(e, a, b, m_s, m_f, eps, u, v, 0, 0, 0, 0, num_iters, HAS_EPS, False)
    found = x[:, :, None] * e * w[:, None, :]
    u_bits, v_bits = tl.log2(x), tl.log2(w)
    if not HAS_EPS:
        v_bits -= shift[:, None]
        safe = ~m_g | ((spread <= SCORE_BITS) & evenly_spread(a, m_s) & evenly_spread(b, m_f))
        if tl.min(safe.to(tl.int32), axis=0) == 0:
            bits = tl.where(mask, raw * factor, -INFINITY)
            u_logs, v_logs = log_iterations(bits, a, b, u, v, 0, 0, 0, 0, num_iters, False)
            found = tl.where(safe[:, None, None], found, log_plan(bits, a, v_logs))
            u_bits = tl.where(safe[:, None], u_bits, u_logs)
            v_bits = tl.where(safe[:, None], v_bits, v_logs)
    o_tile = items[:, None, None] * (num_s * num_f) + o_s[None, :, None] * s_stride + o_f[None, None, :] * f_stride
    tl.store(plan + o_tile, found, mask=mask)
    tl.store(u + items[:, None] * num_s + o_s[None, :], u_bits * LN2, mask=m_s)
    tl.store(v + items[:, None] * num_f + o_f[None, :], v_bits * LN2, mask=m_f)


@triton.jit
def passed_on(share, before, eps):
    """What a scaling passes on to the one before it, with eps; nothing where it is zero."""
    return tl.where(before == 0, 0.0, eps * share / tl.where(before == 0, 1.0, before))


@triton.jit
def linear_gradient(
    g, e, x, w, du, dv, a, b, eps, xs, ws, o_xs, o_ws, xs_stride, ws_stride, num_iters, HAS_EPS: tl.constexpr
):  # fmt: skip
    """Gradient of the entries e [BG, BS, BF] from that of the plan, g, and those of log x and log w."""
    inverse_a = tl.where(a == 0, 0.0, 1.0 / tl.where(a == 0, 1.0, a))
    inverse_b = tl.where(b == 0, 0.0, 1.0 / tl.where(b == 0, 1.0, b))
    gradient = g * x[:, :, None] * w[:, None, :]
    dx = du + tl.sum(gradient * e, axis=2)
    dw = dv + tl.sum(gradient * e, axis=1)
    for step in range(num_iters):
        t = num_iters - step
        x_after = tl.load(xs + o_xs + t * xs_stride)
        x_before = tl.load(xs + o_xs + (t - 1) * xs_stride)
        w_after = tl.load(ws + o_ws + t * ws_stride)
        alpha = dx * x_after * inverse_a
        dw -= w_after * tl.sum(alpha[:, :, None] * e, axis=1)
        beta = dw * w_after * inverse_b
        if HAS_EPS:
            beta = tl.where(t == 1, 0.0, beta)  # before it is the softmax
        gradient -= alpha[:, :, None] * w_after[:, None, :] + x_before[:, :, None] * beta[:, None, :]
        dx = -x_before * tl.sum(e * beta[:, None, :], axis=2)
        dw = tl.zeros_like(dw)
        if HAS_EPS:
            dx += passed_on(alpha, x_before, eps)
            w_before = tl.load(ws + o_ws + (t - 1) * ws_stride)
            dw = passed_on(beta, w_before, eps)
    return gradient


@triton.jit
def log_gradient(
    g, bits, a, b, v, du, dv, us, vs, o_us, o_vs, us_stride, vs_stride, num_iters
):  # fmt: skip
    """Gradient of the entries' natural logarithms from that of the plan, g, and those of the potentials."""
    gradient = g * log_plan(bits, a, v)
    du += tl.sum(gradient, axis=2)
    dv += tl.sum(gradient, axis=1)
    none_a, none_b = (a == 0)[:, :, None], (b == 0)[:, None, :]
    for step in range(num_iters):
        t = num_iters - step
        u_before = tl.load(us + o_us + (t - 1) * us_stride)
        v_after = tl.load(vs + o_vs + t * vs_stride)
        share = tl.where(none_a, 0.0, du[:, :, None] * shares(bits + v_after[:, None, :], 2))
        gradient -= share
        dv -= tl.sum(share, axis=1)
        share = tl.where(none_b, 0.0, dv[:, None, :] * shares(bits + u_before[:, :, None], 1))
        gradient -= share
        du = -tl.sum(share, axis=2)
        dv = tl.zeros_like(dv)
    return gradient


@triton.jit
def small_backward_kernel(
    scores, a_marginals, b_marginals, grad_plan, grad_u, grad_v, xs, ws, grad_scores,
    num_items, num_s, num_f, item_stride, s_stride, f_stride, a_stride, b_stride, a_each, b_each, num_iters, factor, eps, scale,
    HAS_EPS: tl.constexpr, HAS_GRAD_PLAN: tl.constexpr, HAS_GRAD_U: tl.constexpr, HAS_GRAD_V: tl.constexpr,
    BG: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """grad_scores [G, n, K]. xs [num_iters + 1, tiles BG, BS], ws [num_iters + 1, tiles BG, BF]: scratch for the scalings of
    every iteration, of which each program reads back its own. scale: 1 / epsilon. Grid (tiles of items,)."""
    items = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    o_s, o_f = tl.arange(0, BS), tl.arange(0, BF)
    m_g = items < num_items
    m_s, m_f = m_g[:, None] & (o_s < num_s)[None, :], m_g[:, None] & (o_f < num_f)[None, :]
    mask = m_s[:, :, None] & m_f[:, None, :]
    raw, e, _shift, spread = load_problem(scores, items, o_s, o_f, mask, item_stride, s_stride, f_stride, factor, HAS_EPS)
    a = load_vector(a_marginals, items, o_s, o_f, mask, a_stride, a_each, 2)
    b = load_vector(b_marginals, items, o_s, o_f, mask, b_stride, b_each, 1)
    o_tile = items[:, None, None] * (num_s * num_f) + o_s[None, :, None] * s_stride + o_f[None, None, :] * f_stride
    g = tl.zeros((BG, BS, BF), tl.float32)
    du, dv = tl.zeros((BG, BS), tl.float32), tl.zeros((BG, BF), tl.float32)
    if HAS_GRAD_PLAN:
        g = tl.load(grad_plan + o_tile, mask=mask, other=0.0)
    if HAS_GRAD_U:
        du = load_vector(grad_u, items, o_s, o_f, mask, num_s, 0.0, 2)
    if HAS_GRAD_V:
        dv = load_vector(grad_v, items, o_s, o_f, mask, num_f, 0.0, 1)

    o_xs, o_ws = items[:, None] * BS + o_s[None, :], items[:, None] * BF + o_f[None, :]
    padded_items = tl.num_programs(0).to(tl.int64) * BG
    xs_stride, ws_stride = padded_items * BS, padded_items * BF
    if HAS_EPS:
        softmax = softmax_over_second(e, m_f & (b != 0))
        e = tl.where(mask, softmax + eps, 0.0)
    x, w = linear_iterations(e, a, b, m_s, m_f, eps, xs, ws, o_xs, o_ws, xs_stride, ws_stride, num_iters, HAS_EPS, True)
    tl.debug_barrier()  # other threads may read what these wrote
    gradient = linear_gradient(g, e, x, w, du, dv, a, b, eps, xs, ws, o_xs, o_ws, xs_stride, ws_stride, num_iters, HAS_EPS)
    if HAS_EPS:
        gradient = softmax * (gradient - tl.sum(softmax * gradient, axis=1)[:, None, :])
    else:
        gradient *= e
        safe = ~m_g | ((spread <= SCORE_BITS) & evenly_spread(a, m_s) & evenly_spread(b, m_f))
        if tl.min(safe.to(tl.int32), axis=0) == 0:
            bits = tl.where(mask, raw * factor, -INFINITY)
            tl.debug_barrier()
            _u, v = log_iterations(bits, a, b, xs, ws, o_xs, o_ws, xs_stride, ws_stride, num_iters, True)
            tl.debug_barrier()
            of_logs = log_gradient(g, bits, a, b, v, du, dv, xs, ws, o_xs, o_ws, xs_stride, ws_stride, num_iters)
            gradient = tl.where(safe[:, None, None], gradient, of_logs)
    tl.store(grad_scores + o_tile, (gradient * scale).to(grad_scores.dtype.element_ty), mask=mask)
