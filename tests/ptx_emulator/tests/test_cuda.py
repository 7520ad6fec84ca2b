"""CUDA C++ kernels compiled by nvcc."""

import shutil

import numpy as np
import ptx_emulator as pe
import pytest
import torch

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

SRC = r"""
#include <cuda_bf16.h>
#include <cstdint>
#include <cstdio>
#include <cassert>
extern "C" __global__ void vadd(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
extern "C" __global__ void reduce(const float* a, float* out, int n) {
  __shared__ float part[32];
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += a[i];
  for (int o = 16; o; o >>= 1) s += __shfl_down_sync(0xffffffffu, s, o);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < (blockDim.x >> 5) ? part[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) s += __shfl_down_sync(0xffffffffu, s, o);
    if (threadIdx.x == 0) atomicAdd(out, s);
  }
}
template <int PAD> __global__ void transpose(const float* a, float* b, int n) {
  __shared__ float t[32][32 + PAD];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) t[threadIdx.y + j][threadIdx.x] = a[(y + j) * n + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x; y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) b[(y + j) * n + x] = t[threadIdx.x][threadIdx.y + j];
}
template __global__ void transpose<0>(const float*, float*, int);
template __global__ void transpose<1>(const float*, float*, int);
extern "C" __global__ void histogram(const int* a, int* h, unsigned long long* total, int n) {
  __shared__ int s[64];
  if (threadIdx.x < 64) s[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) { atomicAdd(&s[a[i] & 63], 1); atomicMax(total + 1, (unsigned long long)a[i]); }
  __syncthreads();
  if (threadIdx.x < 64) { atomicAdd(h + threadIdx.x, s[threadIdx.x]); atomicAdd(total, (unsigned long long)s[threadIdx.x]); }
}
__device__ __noinline__ float poly(float x, float* out) { *out = x * 2; return x * x + 1; }
struct Args { float scale; int n; float add[3]; };
__constant__ float table_[4] = {1.5f, 2.5f, 3.5f, 4.5f};
__device__ int counter = 7;
extern "C" __global__ void misc(Args p, const float* a, float* b, int k) {
  int i = threadIdx.x;
  float loc[8], two;
  for (int j = 0; j < 8; j++) loc[(j * k) & 7] = a[i] * j;
  float v = poly(loc[i & 7], &two) * p.scale + p.add[i % 3] + table_[i & 3] + two;
  if (i == 3) printf("hello %d %.2f %s\n", counter, (double)p.scale, "x");
  assert(p.n == 5);
  b[i] = v;
}
// C = A[M,K] * B[K,N], bf16, 64x64 tile, 4 warps (2x2), K step 32, two-stage cp.async pipeline
__device__ __forceinline__ uint32_t sa(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
#ifndef NOWAIT
#define WAIT(n) asm volatile("cp.async.wait_group %0;" ::"n"(n))
#else
#define WAIT(n)
#endif
extern "C" __global__ void __launch_bounds__(128) gemm(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, int N, int K) {
  __shared__ __align__(128) __nv_bfloat16 As[2][64][40], Bs[2][32][72];
  int t = threadIdx.x, w = t >> 5, l = t & 31, m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, wm = (w >> 1) * 32, wn = (w & 1) * 32;
  float acc[2][4][4] = {};
  auto load = [&](int st, int k0) {
    for (int c = t; c < 256; c += 128) {
      int r = c >> 2, q = (c & 3) * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(sa(&As[st][r][q])), "l"(A + (size_t)(m0 + r) * K + k0 + q));
      r = c >> 3; q = (c & 7) * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(sa(&Bs[st][r][q])), "l"(B + (size_t)(k0 + r) * N + n0 + q));
    }
    asm volatile("cp.async.commit_group;");
  };
  load(0, 0);
  int nk = K / 32;
  for (int k = 0; k < nk; k++) {
    if (k + 1 < nk) { load((k + 1) & 1, (k + 1) * 32); WAIT(1); } else { WAIT(0); }
    __syncthreads();
    int s = k & 1;
    for (int kk = 0; kk < 32; kk += 16) {
      uint32_t a[2][4], b[4][2];
      for (int i = 0; i < 2; i++)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3]) : "r"(sa(&As[s][wm + i * 16 + (l & 15)][kk + (l >> 4) * 8])));
      for (int j = 0; j < 4; j += 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[j][0]), "=r"(b[j][1]), "=r"(b[j + 1][0]), "=r"(b[j + 1][1]) : "r"(sa(&Bs[s][kk + (l & 15)][wn + j * 8 + (l >> 4) * 8])));
      for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3]) : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
#ifndef NOSYNC
    __syncthreads();
#endif
  }
  for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) for (int e = 0; e < 4; e++)
    C[(size_t)(m0 + wm + i * 16 + (l >> 2) + (e >> 1) * 8) * N + n0 + wn + j * 8 + (l & 3) * 2 + (e & 1)] = acc[i][j][e];
}
extern "C" __global__ void divergent(int* out) {   // nested divergence, early exit, loops of different length
  int t = threadIdx.x, s = 0;
  if (t == 31) return;
  for (int i = 0; i < t; i++) { if (i % 3 == 0) { s += i; continue; } if (i > 20) break; s += (i & 1) ? 2 : 5; }
  switch (t & 7) { case 0: s += 100; break; case 1: s += 200; break; case 2: s -= 7; case 3: s *= 2; break; case 5: s += 9; break; default: s ^= 3; }
  out[t] = s;
}
"""


@pytest.fixture(scope="module")
def mod():
    return pe.compile_cuda(SRC)


def test_vadd(mod):
    n = 1000
    a, b, c = torch.randn(n), torch.randn(n), torch.zeros(n)
    r = mod.kernel("vadd").launch(4, 256, [a, b, c, n])
    assert torch.equal(c, a + b)
    assert r["global"]["load"]["sectors"] == 2 * n // 8 and r["global"]["store"]["efficiency"] == 1.0
    assert r["global"]["unique_store_sectors"] == n // 8
    assert "vadd" in r.table() and r.to_json()


def test_reduce(mod):
    n = 5000
    a, o = torch.randn(n), torch.zeros(1)
    mod.kernel("reduce").launch(3, 256, [a, o, n])
    assert abs(o.item() - a.double().sum().item()) < 1e-3


def test_transpose_bank_conflicts(mod):
    n = 64
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    for pad, factor in ((0, 32), (1, 1)):
        b = np.zeros_like(a)
        r = mod.kernel(f"void transpose<{pad}>").launch((2, 2), (32, 8), [a, b, n])
        assert np.array_equal(b, a.T)
        s = r["shared"]
        assert s["load"]["wavefronts"] == factor * s["load"]["ideal"] and s["store"]["wavefronts"] == s["store"]["ideal"]


def test_atomics(mod):
    n = 3000
    a = np.random.default_rng(0).integers(0, 1000, n).astype(np.int32)
    h, t = np.zeros(64, np.int32), np.zeros(2, np.uint64)
    r = mod.kernel("histogram").launch(3, 128, [a, h, t, n])
    assert np.array_equal(h, np.bincount(a & 63, minlength=64)) and t[0] == n and t[1] == a.max()
    assert r["shared"]["atomic"]["requests"] > 0


def test_calls_local_const_printf(mod):
    import struct

    a, b = np.random.default_rng(0).standard_normal(64).astype(np.float32), np.zeros(64, np.float32)
    r = mod.kernel("misc").launch(1, 64, [struct.pack("<fi3f", 2.0, 5, 10.0, 20.0, 30.0), a, b, 1])
    i = np.arange(64)
    x = (a * (i & 7)).astype(np.float32)
    want = (x * x + 1) * 2 + np.array([10, 20, 30])[i % 3] + np.array([1.5, 2.5, 3.5, 4.5])[i & 3] + 2 * x
    assert np.allclose(b, want, rtol=1e-5, atol=1e-5)
    assert r.output == "hello 7 2.00 x\n" and r["local_bytes"] > 0
    with pytest.raises(pe.KernelError, match="assertion failed") as e:
        mod.kernel("misc").launch(1, 64, [struct.pack("<fi3f", 2.0, 6, 0, 0, 0), a, b, 1])
    assert e.value.kind == "assert"


@pytest.mark.parametrize("seed", [0, 1])
def test_gemm(mod, seed):
    M, N, K = 128, 64, 128
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16(), torch.zeros(M, N)
    r = mod.kernel("gemm").launch((N // 64, M // 64), 128, [a, b, c, M, N, K], seed=seed, quantum=37, check_uninit_reg=True)
    ref = a.double() @ b.double()
    assert (c.double() - ref).abs().max() < 1e-4
    assert r["tensor_flops"] == 2 * M * N * K
    assert r["shared"]["ldmatrix"]["wavefronts"] == r["shared"]["ldmatrix"]["ideal"]
    e = r.estimate("A100")
    assert 0 < e["tensor_utilisation_upper_bound"] <= 1


def test_divergence(mod):
    out = np.zeros(64, np.int32)
    mod.kernel("divergent").launch(1, 64, [out])
    want = []
    for t in range(64):
        s = 0
        if t == 31:
            want.append(0)
            continue
        for i in range(t):
            if i % 3 == 0:
                s += i
                continue
            if i > 20:
                break
            s += 2 if i & 1 else 5
        q = t & 7
        if q == 0:
            s += 100
        elif q == 1:
            s += 200
        elif q == 2:
            s = (s - 7) * 2
        elif q == 3:
            s *= 2
        elif q == 5:
            s += 9
        else:
            s ^= 3
        want.append(s)
    assert np.array_equal(out, want)


HOPPER = r"""
#include <cuda.h>
#include <cstdint>
__device__ __forceinline__ uint32_t sa(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void wait(uint64_t* b, int ph) {
  asm volatile("{\n.reg .pred P1;\nLAB_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P1, [%0], %1;\n@P1 bra DONE;\nbra LAB_WAIT;\nDONE:\n}" ::"r"(sa(b)), "r"(ph));
}
// warp 0 produces tiles by TMA, warps 1..4 consume them: full/empty ring of 2
extern "C" __global__ void tma(const __grid_constant__ CUtensorMap tm, float* out, int tiles, int mode) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t full[2], empty[2];
  float* buf = (float*)smem;
  int w = threadIdx.x >> 5;
  if (threadIdx.x == 0) for (int s = 0; s < 2; s++) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(sa(&full[s])));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 4;" ::"r"(sa(&empty[s])));
  }
  __syncthreads();
  if (w == 0) {
    if (threadIdx.x == 0) for (int i = 0; i < tiles; i++) {
      int s = i & 1;
      wait(&empty[s], ((i >> 1) & 1) ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sa(&full[s])), "r"(32 * 8 * 4));
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(sa(buf + s * 256)), "l"(&tm), "r"(0), "r"(i * 8), "r"(sa(&full[s])) : "memory");
    }
  } else {
    for (int i = 0; i < tiles; i++) {
      int s = i & 1, t = threadIdx.x - 32;
      if (mode != 1) wait(&full[s], (i >> 1) & 1);
      float a = buf[s * 256 + t], b = buf[s * 256 + t + 128];
      __syncwarp();
      if (mode == 2) { if ((t & 31) == 0 && i == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sa(&empty[s])));}
      else if ((t & 31) == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sa(&empty[s])));
      out[i * 256 + t] = a; out[i * 256 + t + 128] = b;
    }
  }
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) dsmem(int* out) {
  __shared__ int v[32];
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  v[threadIdx.x] = threadIdx.x + 100 * rank;
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;");
  uint32_t a, r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(sa(&v[threadIdx.x])), "r"(rank ^ 1));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(r) : "r"(a));
  out[blockIdx.x * 32 + threadIdx.x] = r;
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;");
}
"""


@pytest.fixture(scope="module")
def hopper():
    return pe.compile_cuda(HOPPER, arch="sm_90a")


def test_tma_pipeline(hopper):
    a = np.random.default_rng(0).standard_normal((40, 48)).astype(np.float32)
    tm = pe.TensorMap(a, "f32", dims=[48, 40], strides=[48 * 4], box=[32, 8])
    k = hopper.kernel("tma")
    for seed in range(3):
        out = np.full((6, 8, 32), -1, np.float32)
        k.launch(1, 160, [tm, out, 6, 0], shared=2048, seed=seed, quantum=16)
        want = np.zeros((48, 32), np.float32)
        want[:40] = a[:, :32]  # rows 40..47 are out of bounds: zero fill
        assert np.array_equal(out.reshape(48, 32), want)
    with pytest.raises(pe.KernelError) as e:
        k.launch(1, 160, [tm, out, 6, 1], shared=2048)
    assert e.value.kind in ("race", "uninitialised")
    with pytest.raises(pe.KernelError) as e:
        k.launch(1, 160, [tm, out, 6, 2], shared=2048)
    assert e.value.kind == "deadlock"


def test_cluster_dsmem(hopper):
    out = np.zeros(128, np.int32)
    hopper.kernel("dsmem").launch(4, 32, [out])
    want = np.concatenate([np.arange(32) + 100 * (r ^ 1) for r in (0, 1, 0, 1)])
    assert np.array_equal(out, want)


WIDE = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
__device__ __noinline__ int f0(int x) { return x + 1; }
__device__ __noinline__ int f1(int x) { return x * 3; }
__device__ __noinline__ int f2(int x) { return f0(x) - f1(x); }
typedef int (*fn)(int);
__device__ fn table_[3] = {f0, f1, f2};
extern "C" __global__ void indirect(int* o) { fn f = table_[threadIdx.x % 3]; o[threadIdx.x] = f(threadIdx.x); }
extern "C" __global__ void warpops(const int* a, int* o, double* d, __half2* h, unsigned* u16) {
  int t = threadIdx.x, v = a[t];
  o[t] = __syncthreads_count(v & 1);
  o[64 + t] = __ballot_sync(~0u, v & 2) + __popc(__activemask());
  o[128 + t] = __match_any_sync(~0u, v & 3);
  o[192 + t] = __reduce_add_sync(~0u, v) + __reduce_max_sync(~0u, v);
  o[256 + t] = __syncthreads_or(v == 5) * 2 + __syncthreads_and(v >= 0);
  atomicAdd(d, (double)v);
  atomicAdd(h, __floats2half2_rn(1.f, 2.f));
  atomicInc(u16, 40u);
  unsigned mask = __ballot_sync(~0u, t & 1);
  if (t & 1) { o[320 + t] = __shfl_xor_sync(mask, v, 2); __syncwarp(mask); } else o[320 + t] = -1;
}
extern "C" __global__ void bigswitch(const int* a, int* o) {
  int t = threadIdx.x, r = 0;
  switch (a[t]) {
    case 0: r = t * 3; break; case 1: r = t ^ 5; break; case 2: r = t + 77; break; case 3: r = t * t; break; case 4: r = -t; break;
    case 5: r = o[t] + 9; break; case 6: r = t << 3; break; case 7: r = t % 5; break; case 8: r = 1 - t; break; default: r = 42;
  }
  o[t] = r;
}
extern "C" __global__ void fastmath(const float* a, float* o) {
  int t = threadIdx.x; float x = a[t];
  o[t] = __expf(x) + __sinf(x) * __fdividef(x, 3.f) + rsqrtf(fabsf(x) + 1.f) + tanhf(x) + __logf(fabsf(x) + 1.f) + powf(fabsf(x), 1.5f) + erff(x);
}
extern "C" __global__ void wide(const unsigned long long* a, unsigned long long* o) {
  int t = threadIdx.x; unsigned long long x = a[t], y = a[t ^ 1];
  o[t] = __umul64hi(x, y) + x / (y | 1) + (x % (y | 3)) + __brevll(x) + __clzll(y) + __ffsll(x) + (unsigned long long)__byte_perm((unsigned)x, (unsigned)y, 0x5140);
}
"""


@pytest.mark.parametrize("flags", [[], ["-use_fast_math"], ["-G"]])
def test_wide_coverage(flags):
    m = pe.compile_cuda(WIDE, flags=flags)
    t = np.arange(64)
    o = np.zeros(64, np.int32)
    m.kernel("indirect").launch(1, 64, [o])
    assert np.array_equal(o, np.where(t % 3 == 0, t + 1, np.where(t % 3 == 1, t * 3, t + 1 - 3 * t)))
    a = np.random.default_rng(3).integers(0, 50, 64).astype(np.int32)
    o, d, h, u = np.zeros(384, np.int32), np.zeros(1), np.zeros(2, np.float16), np.zeros(1, np.uint32)
    m.kernel("warpops").launch(1, 64, [a, o, d, h, u])
    o = o.reshape(6, 64)
    assert (o[0] == (a & 1).sum()).all() and d[0] == a.sum() and h.tolist() == [64, 128] and u[0] == 64 % 41
    for w in range(2):
        v = a[32 * w : 32 * w + 32]
        bal = sum(1 << i for i in range(32) if v[i] & 2)
        assert (o[1].view(np.uint32)[32 * w : 32 * w + 32] == (bal + 32) & 0xFFFFFFFF).all()
        assert (o[3][32 * w : 32 * w + 32] == v.sum() + v.max()).all()
        mt = [sum(1 << j for j in range(32) if v[j] & 3 == v[i] & 3) for i in range(32)]
        assert np.array_equal(o[2].view(np.uint32)[32 * w : 32 * w + 32], mt)
    assert (o[4] == 2 * (a == 5).any() + 1).all()
    assert np.array_equal(o[5], np.where(t & 1, a[t ^ 2], -1))
    c = (t % 11).astype(np.int32)
    o = np.full(64, 4, np.int32)
    m.kernel("bigswitch").launch(1, 64, [c, o])
    want = np.choose(np.minimum(c, 9), [t * 3, t ^ 5, t + 77, t * t, -t, 13 + 0 * t, t << 3, t % 5, 1 - t, 42 + 0 * t])
    assert np.array_equal(o, want)
    x = np.linspace(-3, 3, 64).astype(np.float32)
    f = np.zeros(64, np.float32)
    m.kernel("fastmath").launch(1, 64, [x, f])
    X = torch.from_numpy(x).double()
    ref = X.exp() + X.sin() * X / 3 + (X.abs() + 1).rsqrt() + X.tanh() + (X.abs() + 1).log() + X.abs() ** 1.5 + X.erf()
    assert np.allclose(f, ref.numpy(), rtol=1e-4, atol=1e-4)
    b = np.random.default_rng(1).integers(1, 2**63, 64).astype(np.uint64)
    o = np.zeros(64, np.uint64)
    m.kernel("wide").launch(1, 64, [b, o])
    for i in range(64):
        p, q = int(b[i]), int(b[i ^ 1])
        by = (p & 0xFFFFFFFF).to_bytes(4, "little") + (q & 0xFFFFFFFF).to_bytes(4, "little")
        perm = int.from_bytes(bytes(by[s] for s in (0, 4, 1, 5)), "little")
        w = (
            (p * q >> 64)
            + p // (q | 1)
            + p % (q | 3)
            + int(f"{p:064b}"[::-1], 2)
            + (64 - q.bit_length())
            + ((p & -p).bit_length())
            + perm
        )
        assert int(o[i]) == w & (2**64 - 1)
