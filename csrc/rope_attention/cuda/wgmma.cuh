// Instructions of sm_90a: warpgroup products (wgmma), bulk copies, mbarriers, register reallocation.
//
// Operands in shared memory are *images* without swizzle: a core matrix is 8 rows x 16 bytes, 128 contiguous bytes, and two
// strides place core matrices along rows and along channels. A tile of keys [keys, channels] serves as the second operand of
// Q K^T (channels contiguous along k) and, transposed, of P V.
#pragma once

#include "products.cuh"

namespace comp_kernels {

// Matrix descriptor; strides in bytes between core matrices. For an operand that is read along its channels (K-major):
// leading = to the next 8 channels, stride = to the next 8 rows. Transposed (MN-major): leading = to the next 8 rows (along
// k), stride = to the next 8 channels.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>(shared >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32;
}

// The same operand `bytes` (a multiple of 16) further on.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// Rows of kHeadDim channels in an image as right operand, K-major, in steps of 16 channels. stride: to the next 8 rows.
template <int kHeadDim>
struct StepColumns {
  uint64_t whole, last;
  __device__ __forceinline__ StepColumns(uint32_t image, uint32_t stride)
      : whole(matrix_descriptor(image, 128, stride)),
        // The second half of the last step, where the left operand is zero, reads the first half again: something finite.
        last(kHeadDim % 16 == 0 ? whole : matrix_descriptor(image, 0, stride)) {}
  __device__ __forceinline__ uint64_t operator[](int step) const {
    return advanced((step + 1) * 16 < kHeadDim ? whole : last, step * 256);
  }
};

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of an operand across a wait, or from giving its registers away before.
template <int kColumns>
__device__ __forceinline__ void pin(Accumulator<1, kColumns>& c) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[0][n][i])::"memory");
  }
}

template <int kSteps>
__device__ __forceinline__ void pin(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[k][i])::"memory");
  }
}

// c[64, kN] (+)= a[64, 16] b[16, kN] of one warpgroup, asynchronous. from_shared: both operands are descriptors, K-major;
// add = 0 overwrites c. from_registers: a is in registers, laid out as for mma_k16; b is MN-major; adds. from_registers_along: a
// in registers, b K-major.
template <typename T, int kN>
struct Wgmma;

#define WGMMA_OUTPUTS_8(c, n)                                                                                         \
  "+f"(c[0][n][0]), "+f"(c[0][n][1]), "+f"(c[0][n][2]), "+f"(c[0][n][3]), "+f"(c[0][n + 1][0]), "+f"(c[0][n + 1][1]), \
      "+f"(c[0][n + 1][2]), "+f"(c[0][n + 1][3])

// registers: the list of the kN / 2 accumulator registers; i0..i4: the numbers of the asm operands that follow them.
#define WGMMA_SPECIALIZATION(T, type, kN, registers, i0, i1, i2, i3, i4, i5, ...)                                                  \
  template <>                                                                                                                      \
  struct Wgmma<T, kN> {                                                                                                            \
    static __device__ __forceinline__ void from_shared(Accumulator<1, kN / 8>& c, uint64_t a, uint64_t b, int add) {               \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i2 ", 0; wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type     \
                   " {" registers "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, 0;}"                                                         \
                   : __VA_ARGS__                                                                                                   \
                   : "l"(a), "l"(b), "r"(add));                                                                                    \
    }                                                                                                                              \
    static __device__ __forceinline__ void from_registers(Accumulator<1, kN / 8>& c, const uint32_t (&a)[4], uint64_t b) {         \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type " {" registers "}, {%" #i0 ", %" #i1 ", %" #i2 \
                   ", %" #i3 "}, %" #i4 ", 1, 1, 1, 1;"                                                                            \
                   : __VA_ARGS__                                                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                          \
    }                                                                                                                              \
    static __device__ __forceinline__ void from_registers_along(Accumulator<1, kN / 8>& c, const uint32_t (&a)[4], uint64_t b,     \
                                                                int add) {                                                         \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i5 ", 0; wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type     \
                   " {" registers "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, 0;}"                            \
                   : __VA_ARGS__                                                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                                \
    }                                                                                                                              \
  };
#define WGMMA_SPECIALIZATIONS(kN, registers, i0, i1, i2, i3, i4, i5, ...)                \
  WGMMA_SPECIALIZATION(bf16, "bf16", kN, registers, i0, i1, i2, i3, i4, i5, __VA_ARGS__) \
  WGMMA_SPECIALIZATION(fp16, "f16", kN, registers, i0, i1, i2, i3, i4, i5, __VA_ARGS__)

#define WGMMA_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_32_36 "%32, %33, %34, %35"
#define WGMMA_REGISTERS_32_40 WGMMA_REGISTERS_32_36 ", %36, %37, %38, %39"
WGMMA_SPECIALIZATIONS(32, WGMMA_REGISTERS_0, 16, 17, 18, 19, 20, 21, WGMMA_OUTPUTS_8(c, 0), WGMMA_OUTPUTS_8(c, 2))
WGMMA_SPECIALIZATIONS(64, WGMMA_REGISTERS_0 ", " WGMMA_REGISTERS_16, 32, 33, 34, 35, 36, 37, WGMMA_OUTPUTS_8(c, 0),
                      WGMMA_OUTPUTS_8(c, 2), WGMMA_OUTPUTS_8(c, 4), WGMMA_OUTPUTS_8(c, 6))
WGMMA_SPECIALIZATIONS(72, WGMMA_REGISTERS_0 ", " WGMMA_REGISTERS_16 ", " WGMMA_REGISTERS_32_36, 36, 37, 38, 39, 40, 41,
                      WGMMA_OUTPUTS_8(c, 0), WGMMA_OUTPUTS_8(c, 2), WGMMA_OUTPUTS_8(c, 4), WGMMA_OUTPUTS_8(c, 6), "+f"(c[0][8][0]),
                      "+f"(c[0][8][1]), "+f"(c[0][8][2]), "+f"(c[0][8][3]))
WGMMA_SPECIALIZATIONS(80, WGMMA_REGISTERS_0 ", " WGMMA_REGISTERS_16 ", " WGMMA_REGISTERS_32_40, 40, 41, 42, 43, 44, 45,
                      WGMMA_OUTPUTS_8(c, 0), WGMMA_OUTPUTS_8(c, 2), WGMMA_OUTPUTS_8(c, 4), WGMMA_OUTPUTS_8(c, 6),
                      WGMMA_OUTPUTS_8(c, 8))
WGMMA_SPECIALIZATIONS(96, WGMMA_REGISTERS_0 ", " WGMMA_REGISTERS_16 ", " WGMMA_REGISTERS_32, 48, 49, 50, 51, 52, 53,
                      WGMMA_OUTPUTS_8(c, 0), WGMMA_OUTPUTS_8(c, 2), WGMMA_OUTPUTS_8(c, 4), WGMMA_OUTPUTS_8(c, 6),
                      WGMMA_OUTPUTS_8(c, 8), WGMMA_OUTPUTS_8(c, 10))
WGMMA_SPECIALIZATIONS(128, WGMMA_REGISTERS_0 ", " WGMMA_REGISTERS_16 ", " WGMMA_REGISTERS_32 ", " WGMMA_REGISTERS_48, 64, 65, 66,
                      67, 68, 69, WGMMA_OUTPUTS_8(c, 0), WGMMA_OUTPUTS_8(c, 2), WGMMA_OUTPUTS_8(c, 4), WGMMA_OUTPUTS_8(c, 6),
                      WGMMA_OUTPUTS_8(c, 8), WGMMA_OUTPUTS_8(c, 10), WGMMA_OUTPUTS_8(c, 12), WGMMA_OUTPUTS_8(c, 14))

// Weights as left operands of from_registers: c rounded to T, in the first kCount / 2 of packed. Only while no product that
// reads packed is under way.
template <typename T, int kCount, int kSteps>
__device__ __forceinline__ void pack_left(uint32_t (&packed)[kSteps][4], const Accumulator<1, kCount>& c) {
  static_assert(kCount / 2 <= kSteps);
#pragma unroll
  for (int k = 0; k < kCount / 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&w)[4] = c[0][2 * k + i / 2];
      packed[k][i] = pack<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
    }
  }
}

// --- bulk copies and the barriers that announce them ------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Wait until the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (done == 0);
}
// Contiguous bytes (a multiple of 16) from global to shared memory; completes on the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(global),
               "r"(bytes), "r"(barrier)
               : "memory");
}
// Make this thread's ordinary writes to shared memory visible to wgmma and bulk copies.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Barrier of `threads` threads among those that name the same number.
template <int kNumber, int kThreads>
__device__ __forceinline__ void named_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

// The same barrier where its number is known at run time only, and its half that does not wait.
__device__ __forceinline__ void named_barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Where a walk around a ring of tiles stands: the slot, and the parity of its turn.
template <int kStages>
struct RingPosition {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ RingPosition before() const {
    return stage == 0 ? RingPosition{kStages - 1, parity ^ 1} : RingPosition{stage - 1, parity};
  }
};

// Named barriers from here on are the turns in which the warpgroups start products; 1 is used for all of them.
constexpr int kFirstTurn = 2;

}  // namespace comp_kernels
