"""Triton kernels used by the tests."""

import triton
import triton.language as tl


@triton.jit
def softmax(x, y, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + c, mask=c < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * stride + c, e / tl.sum(e, 0), mask=c < n)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr = "tf32"):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        x = tl.load(a + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        y = tl.load(b + rk[:, None] * N + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PREC)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def layernorm(x, y, w, dw, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    m = c < n
    v = tl.load(x + row * n + c, mask=m, other=0.0)
    mean = tl.sum(v, 0) / n
    d = tl.where(m, v - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, 0) / n + eps)
    h = d * rstd
    tl.store(y + row * n + c, h * tl.load(w + c, mask=m, other=0.0), mask=m)
    tl.atomic_add(dw + c, h, mask=m)


@triton.jit
def attention(q, k, v, o, lse, T, scale, sh, st, D, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """o = softmax(q k^T * scale) v for one head per program_id(1); D may be smaller than the padded BD."""
    h = tl.program_id(1)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd = tl.arange(0, BD)
    md = rd[None, :] < D
    base = h * sh
    x = tl.load(q + base + rm[:, None] * st + rd[None, :], mask=(rm[:, None] < T) & md, other=0.0)
    mi = tl.full((BM,), -float("inf"), tl.float32)
    li = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    qs = scale * 1.44269504
    for n in range(0, T, BN):
        rn = n + tl.arange(0, BN)
        kk = tl.load(k + base + rn[None, :] * st + rd[:, None], mask=(rn[None, :] < T) & (rd[:, None] < D), other=0.0)
        s = tl.dot(x, kk) * qs
        s = tl.where(rn[None, :] < T, s, -float("inf"))
        mn = tl.maximum(mi, tl.max(s, 1))
        p = tl.exp2(s - mn[:, None])
        al = tl.exp2(mi - mn)
        li = li * al + tl.sum(p, 1)
        vv = tl.load(v + base + rn[:, None] * st + rd[None, :], mask=(rn[:, None] < T) & md, other=0.0)
        acc = tl.dot(p.to(vv.dtype), vv, acc * al[:, None])
        mi = mn
    acc = acc / li[:, None]
    tl.store(o + base + rm[:, None] * st + rd[None, :], acc.to(o.dtype.element_ty), mask=(rm[:, None] < T) & md)
    tl.store(lse + h * T + rm, mi + tl.log2(li), mask=rm < T)


@triton.jit
def tma_copy(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    dx = tl.make_tensor_descriptor(x, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    dy = tl.make_tensor_descriptor(y, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    i = tl.program_id(0) * BM
    j = tl.program_id(1) * BN
    dy.store([i, j], dx.load([i, j]) * 2)


@triton.jit
def matmul_i8(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        acc += tl.dot(tl.load(a + rm[:, None] * K + rk[None, :]), tl.load(b + rk[:, None] * N + rn[None, :]))
    tl.store(c + rm[:, None] * N + rn[None, :], acc)


@triton.jit
def matmul_tma(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    da = tl.make_tensor_descriptor(a, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    db = tl.make_tensor_descriptor(b, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    dc = tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    i = tl.program_id(0) * BM
    j = tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(da.load([i, k]), db.load([j, k]).T, acc)
    dc.store([i, j], acc.to(c.dtype.element_ty))
