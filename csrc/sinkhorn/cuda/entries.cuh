// Entries of the plan in bits, as they come from the scores, and sums of their powers of two.
#pragma once

#include <type_traits>

#include "common/cuda/ptx.cuh"

namespace comp_kernels {

struct fp32 {};

template <typename T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<fp32> = true;

// Elements in 16 bytes.
template <typename T>
constexpr int kScoresPerAccess = kIsFloat<T> ? 4 : 8;

// 16 bytes of scores, or one score, as they lie in memory.
template <typename T, int kVec>
struct Chunk {
  uint4 bits;
  __device__ __forceinline__ void load_global(const void* scores, int64_t at) {
    constexpr int kBytes = kIsFloat<T> ? 4 : 2;
    bits = __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(scores) + at * kBytes));
  }
  __device__ __forceinline__ void load_shared(const char* stored, int chunk) {
    bits = *reinterpret_cast<const uint4*>(stored + chunk * 16);
  }
  __device__ __forceinline__ void to_floats(float (&x)[kVec]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kIsFloat<T>) {
        x[i] = __uint_as_float(words[i]);
      } else {
        unpack<T>(words[i], x[2 * i], x[2 * i + 1]);
      }
    }
  }
};
template <typename T>
struct Chunk<T, 1> {
  using Stored = std::conditional_t<kIsFloat<T>, uint32_t, uint16_t>;
  Stored bits;
  __device__ __forceinline__ void load_global(const void* scores, int64_t at) {
    bits = __ldg(static_cast<const Stored*>(scores) + at);
  }
  __device__ __forceinline__ void load_shared(const char* stored, int chunk) {
    bits = reinterpret_cast<const Stored*>(stored)[chunk];
  }
  __device__ __forceinline__ void to_floats(float (&x)[1]) const {
    if constexpr (kIsFloat<T>) {
      x[0] = __uint_as_float(bits);
    } else {
      float unused;
      unpack<T>(bits, x[0], unused);
    }
  }
};

// kVec consecutive scores as floats, in one access: 16 bytes, or 8 (four 16-bit scores), or one score.
template <typename T, int kVec>
__device__ __forceinline__ void load_scores(float (&x)[kVec], const void* scores, int64_t at) {
  if constexpr (kVec == 4 && !kIsFloat<T>) {
    const uint2 four = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(scores) + at));
    unpack<T>(four.x, x[0], x[1]);
    unpack<T>(four.y, x[2], x[3]);
  } else {
    Chunk<T, kVec> chunk;
    chunk.load_global(scores, at);
    chunk.to_floats(x);
  }
}

template <int kVec>
__device__ __forceinline__ void load_potentials(float (&x)[kVec], const float* from) {
  if constexpr (kVec == 1) {
    x[0] = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
}

// An entry of the plan in bits, up to the other potential. The product is rounded before the sum, as in the definition: a
// fused product would leave its rounding error behind where the two cancel.
__device__ __forceinline__ float entry(float score, float factor, float potential) {
  return __fadd_rn(__fmul_rn(score, factor), potential);
}

// A sum of powers of two, sum * 2^peak, that no finite entry overflows. Peak is -infinity as long as all entries were. An entry
// of +infinity makes the sum one, an entry that is not a number makes it none, as log-sum-exp has it.
struct LogSum {
  float peak = -kInfinity, sum = 0.f;

  LogSum() = default;
  __device__ __forceinline__ explicit LogSum(float2 pair) : peak(pair.x), sum(pair.y) {}
  __device__ __forceinline__ float2 pair() const { return float2{peak, sum}; }

  // What may be subtracted from entries: not an infinity from itself.
  static __device__ __forceinline__ float finite(float peak) { return fabsf(peak) == kInfinity ? 0.f : peak; }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount]) {
    float highest = peak;
#pragma unroll
    for (int i = 0; i < kCount; ++i) highest = fmaxf(highest, x[i]);
    const float shift = finite(highest);
    sum *= exp2_approx(peak - shift);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exp2_approx(x[i] - shift);
    peak = highest;
  }
  __device__ __forceinline__ void add(const LogSum& other) {
    const float highest = fmaxf(peak, other.peak), shift = finite(highest);
    sum = sum * exp2_approx(peak - shift) + other.sum * exp2_approx(other.peak - shift);
    peak = highest;
  }
  __device__ __forceinline__ float log2() const { return peak + __log2f(sum); }
};

// Of index `at`, where a null pointer stands for the same marginal everywhere.
__device__ __forceinline__ float marginal(const float* marginals, int64_t at, float otherwise) {
  return marginals != nullptr ? marginals[at] : otherwise;
}

// The potential that brings a sum (log2) to a marginal; -infinity, no mass, where the marginal is zero.
__device__ __forceinline__ float potential(float marginal, float log_sum) {
  return marginal == 0.f ? -kInfinity : __log2f(marginal) - log_sum;
}

}  // namespace comp_kernels
