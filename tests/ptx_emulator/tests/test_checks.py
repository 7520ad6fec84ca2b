"""Each checker catches a planted bug, with the location in the error."""

import shutil

import numpy as np
import ptx_emulator as pe
import pytest
import torch
from test_cuda import SRC as GEMM_SRC

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
BUGS = r"""
extern "C" __global__ void nosync(float* out) {       // missing __syncthreads
  __shared__ float s[128];
  s[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void war(float* out) {          // buffer reused without a barrier
  __shared__ float s[128];
  for (int i = 0; i < 2; i++) { s[threadIdx.x] = i; __syncthreads(); out[threadIdx.x] += s[127 - threadIdx.x]; }
}
extern "C" __global__ void oob(float* out, int n) { out[blockIdx.x * blockDim.x + threadIdx.x] = 1; }
extern "C" __global__ void misaligned(char* out) { *(int*)(out + threadIdx.x * 3) = 1; }
extern "C" __global__ void uninit(float* out) {
  __shared__ float s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void deadlock() {               // one warp never arrives
  if (threadIdx.x < 64) asm volatile("bar.sync 1, 128;");
}
extern "C" __global__ void divergent() { if (threadIdx.x & 1) asm volatile("bar.sync 0;"); else asm volatile("bar.sync 1;"); }
extern "C" __global__ void forever(int* p) { while (*(volatile int*)p == 0) ; }
extern "C" __global__ void shared_oob(float* out) { extern __shared__ float d[]; d[threadIdx.x] = 1; out[0] = d[0]; }
extern "C" __global__ void named(float* out) {        // producer/consumer with named barriers: correct
  __shared__ float s[64];
  int w = threadIdx.x >> 5;
  for (int i = 0; i < 4; i++) {
    if (w < 2) { if (i) asm volatile("bar.sync 2, 128;" ::: "memory"); s[threadIdx.x] = i; asm volatile("bar.arrive 1, 128;" ::: "memory"); }
    else { asm volatile("bar.sync 1, 128;" ::: "memory"); out[threadIdx.x - 64] += s[threadIdx.x - 64]; if (i < 3) asm volatile("bar.arrive 2, 128;" ::: "memory"); }
  }
}
extern "C" __global__ void spinlock(int* lock, int* v) {   // divergent lanes of one warp take a lock: needs forward progress
  bool done = false;
  while (!done) { if (atomicCAS(lock, 0, 1) == 0) { int x = *(volatile int*)v; *(volatile int*)v = x + 1; __threadfence(); atomicExch(lock, 0); done = true; } }
}
extern "C" __global__ void grid_sync(int* c, int* out) {
  out[blockIdx.x] = 1; __threadfence(); atomicAdd(c, 1);
  while (*(volatile int*)c < gridDim.x) ;
  int s = 0; for (int i = 0; i < gridDim.x; i++) s += ((volatile int*)out)[i];
  out[gridDim.x + blockIdx.x] = s;
}
"""


@pytest.fixture(scope="module")
def mod():
    return pe.compile_cuda(BUGS)


def fails(k, kind, *a, **kw):
    with pytest.raises(pe.KernelError) as e:
        k.launch(*a, **kw)
    assert e.value.kind == kind, e.value
    assert e.value.line > 0 and e.value.kernel == k.name
    return e.value


def test_missing_syncthreads(mod):
    out = np.zeros(128, np.float32)
    for seed in range(4):
        e = fails(mod.kernel("nosync"), "race", 1, 128, [out], seed=seed, check_uninit_shared=False)
        assert "not ordered after" in str(e) and e.warp >= 0 and e.lane >= 0 and "kernel.cu" in e.source


def test_write_after_read(mod):
    fails(mod.kernel("war"), "race", 1, 128, [np.zeros(128, np.float32)], quantum=4)


def test_out_of_bounds(mod):
    e = fails(mod.kernel("oob"), "out-of-bounds", 2, 64, [np.zeros(100, np.float32), 100])
    assert e.block == (1, 0, 0) and e.warp == 1 and e.lane == 4 and "past its end" in str(e)
    fails(mod.kernel("misaligned"), "misaligned", 1, 32, [np.zeros(128, np.int32)])
    fails(mod.kernel("shared_oob"), "out-of-bounds", 1, 64, [np.zeros(1, np.float32)], shared=128)


def test_uninitialised_shared(mod):
    out = np.zeros(64, np.float32)
    e = fails(mod.kernel("uninit"), "uninitialised", 1, 64, [out])
    assert e.warp == 1
    mod.kernel("uninit").launch(1, 64, [out], check_uninit_shared=False)


def test_barriers(mod):
    e = fails(mod.kernel("deadlock"), "deadlock", 1, 128)
    assert "64 of 128 threads arrived" in str(e)
    fails(mod.kernel("divergent"), "barrier", 1, 32)
    out = np.zeros(64, np.float32)
    for seed in range(5):
        out[:] = 0
        mod.kernel("named").launch(1, 128, [out], seed=seed, quantum=8)
        assert (out == 6).all()


def test_endless_loop(mod):
    fails(mod.kernel("forever"), "limit", 1, 32, [np.zeros(1, np.int32)], max_steps=100000)


def test_spinlock(mod):
    lock, v = np.zeros(1, np.int32), np.zeros(1, np.int32)
    mod.kernel("spinlock").launch(2, 64, [lock, v])
    assert v[0] == 128


def test_cooperative(mod):
    c, out = np.zeros(1, np.int32), np.zeros(8, np.int32)
    mod.kernel("grid_sync").launch(4, 1, [c, out], cooperative=True)
    assert (out[4:] == 4).all()


@pytest.mark.parametrize("flag", ["-DNOWAIT", "-DNOSYNC"])
def test_pipeline_bugs(flag):
    m = pe.compile_cuda(GEMM_SRC, flags=[flag])
    a, b, c = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16(), torch.zeros(64, 64)
    for seed in range(3):
        with pytest.raises(pe.KernelError) as e:
            m.kernel("gemm").launch((1, 1), 128, [a, b, c, 64, 64, 128], seed=seed, quantum=64)
        # without the second barrier the next copy collides with reads: seen from either side
        assert e.value.kind in (("async-copy",) if flag == "-DNOWAIT" else ("race", "async-copy")), e.value


def test_uninitialised_register():
    ptx = """.version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p) { .reg .b32 %r<3>; .reg .b64 %a;
    ld.param.u64 %a, [p]; add.u32 %r1, %r2, 1; st.global.u32 [%a], %r1; ret; }"""
    fails(pe.load(ptx).kernel(), "uninitialised", 1, 32, [np.zeros(4, np.int32)], check_uninit_reg=True)


def test_unsupported_instruction():
    ptx = """.version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() { tex.1d.v4.f32.s32 {%f1}, [x, {%r1}]; ret; }"""
    with pytest.raises(pe.PtxError, match="line 4|tex"):
        pe.load(ptx).kernel()


PROXY = r"""
// Values go through shared memory to a bulk store. which: 0 the writer fences, 1 the thread that stores, 2 nobody, 3 the writer, but
// before it writes.
extern "C" __global__ void publish(float* out, int which) {
  __shared__ __align__(16) float s[32];
  if (threadIdx.x < 32) {
    if (which == 3) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    s[threadIdx.x] = threadIdx.x;
    if (which == 0) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x == 32) {
    if (which == 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    unsigned from = (unsigned)__cvta_generic_to_shared(s);
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;\ncp.async.bulk.commit_group;\n"
                 "cp.async.bulk.wait_group 0;" ::"l"(out), "r"(from) : "memory");
  }
}
// which: 0 as it should be, 1 reads before it waits, 2 writes before, 3 one warp does not wait, 4 one block does not, 5 reads by ld.nc
extern "C" __global__ void dependent(const float* before, const float* input, float* out, int which) {
  float x = input[threadIdx.x];
  if (which == 1) x += before[threadIdx.x];
  if (which == 2) out[threadIdx.x] = x;
  if (which == 4 && blockIdx.x > 0) return;
  if (which != 3 || threadIdx.x < 32) asm volatile("griddepcontrol.wait;" ::: "memory");
  out[threadIdx.x] = x + (which == 5 ? __ldg(before + threadIdx.x) : before[threadIdx.x]);
}
"""


@pytest.fixture(scope="module")
def sm90():
    return pe.compile_cuda(PROXY, arch="sm_90a")


@pytest.mark.parametrize(("which", "right"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_fence_between_proxies_on_either_side_of_the_barrier(sm90, which, right):
    out = np.zeros(32, np.float32)
    if right:
        sm90.kernel("publish").launch(1, 64, [out, which], check_proxy=True)
        assert (out == np.arange(32)).all()
    else:
        with pytest.raises(pe.KernelError) as error:
            sm90.kernel("publish").launch(1, 64, [out, which], check_proxy=True)
        assert error.value.kind == "proxy"


@pytest.mark.parametrize(
    ("which", "message"), [(0, ""), (1, "read of"), (2, "write of"), (3, "read of"), (4, "a block ended"), (5, "ld.global.nc")]
)
def test_dependent_launches_wait_before_they_touch_memory(sm90, which, message):
    before, data, out = (np.zeros(64, np.float32) for _ in range(3))
    first = (
        pe.compile_cuda('extern "C" __global__ void fill(float* x) { x[threadIdx.x] = 1; }').kernel().launch(1, 64, [before])
    )
    assert first.written() == [(before.ctypes.data & ~31, before.ctypes.data + 256 + 31 & ~31)]
    kernel, args = sm90.kernel("dependent"), [before, data, out, which]
    kernel.launch(2, 64, args)  # launched as usual it may do all that
    if not message:
        kernel.launch(2, 64, args, after=first.written())
        assert (out == 1).all()
    else:
        with pytest.raises(pe.KernelError, match=message) as error:
            kernel.launch(2, 64, args, after=first.written())
        assert error.value.kind == "dependent-launch"
