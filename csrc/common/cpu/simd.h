// Short vectors for the kernels, in the compiler's own vector types: one source for SSE2, NEON, AVX2 and AVX-512.
//
// `Vec<T>` holds kLanes<T> elements of float or double; + - * / and comparisons work lane by lane, and a product followed by
// a sum is contracted to one fused multiply-add where the instruction set has it (-ffp-contract=fast).
// Everything lives in a namespace named after the instruction set, and is inlined: no symbol of one set can be taken for
// another's when the objects are linked together.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef COMP_KERNELS_ISA
#define COMP_KERNELS_ISA baseline
#endif

#ifndef COMP_KERNELS_VECTOR_BYTES
#if defined(__AVX512F__)
#define COMP_KERNELS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define COMP_KERNELS_VECTOR_BYTES 32
#else
#define COMP_KERNELS_VECTOR_BYTES 16
#endif
#endif

#define CK_INLINE inline __attribute__((always_inline))

// SHUFFLE(T, a, b, i...): lane i of the concatenation of a and b, for constant lanes i.
#if defined(__clang__)
#define SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, BitVec<T>{__VA_ARGS__})
#endif

namespace comp_kernels::COMP_KERNELS_ISA {

constexpr int kVectorBytes = COMP_KERNELS_VECTOR_BYTES;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

CK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Integer of the same width, for bit patterns and comparison masks.
template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <typename T>
struct VectorTypes {
  typedef T Full __attribute__((vector_size(kVectorBytes)));
  typedef BitsOf<T> Bits __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T))));
};
template <typename T>
using Vec = typename VectorTypes<T>::Full;
template <typename T>
using BitVec = typename VectorTypes<T>::Bits;

template <typename T>
CK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorTypes<T>::Unaligned*>(p);
}

template <typename T>
CK_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VectorTypes<T>::Unaligned*>(p) = x;
}

template <typename T>
CK_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // not "+": x + 0 is not x for -0, and the compiler would have to add
}

// The larger of each pair; b where either is NaN.
template <typename T>
CK_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_max_ps(0xffff, a, b);  // the compiler takes two instructions
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_max_ps(a, b);
#endif
  return a > b ? a : b;
}

// The smaller of each pair; b where either is NaN.
template <typename T>
CK_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_min_ps(a, b);
#endif
  return a < b ? a : b;
}

// All bits set in the first `n` lanes, none in the rest.
template <typename T>
CK_INLINE BitVec<T> first_lanes(int64_t n) {
  BitVec<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < static_cast<BitsOf<T>>(n);
}

template <typename T, int... kLane>
CK_INLINE Vec<T> swap_neighbours(Vec<T> x, std::integer_sequence<int, kLane...>) {
  return SHUFFLE(T, x, x, (kLane ^ 1)...);
}

// [x0 x1 x2 x3] -> [x1 x0 x3 x2]
template <typename T>
CK_INLINE Vec<T> swap_neighbours(Vec<T> x) {
  return swap_neighbours<T>(x, std::make_integer_sequence<int, kLanes<T>>{});
}

template <typename T>
CK_INLINE Vec<T> select(BitVec<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}

template <typename T>
CK_INLINE T reduce_max(Vec<T> x) {
  T result = x[0];
  for (int i = 1; i < kLanes<T>; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

template <typename T>
CK_INLINE T reduce_sum(Vec<T> x) {
  T result = x[0];
  for (int i = 1; i < kLanes<T>; ++i) result += x[i];
  return result;
}

// 2^x for x <= 0 (larger x up to the overflow threshold work too), relative error about one rounding, with a table about two.
// Exactly 0 for -inf; below the range of normal numbers it fades to 0; NaN stays NaN when the low 9 bits of its payload are zero
// (double: 12), as in every NaN that arithmetic makes.
//
// N vectors at once, step by step: one vector's chain of a dozen dependent operations would fill the scheduler with waiting ones.
#if defined(__AVX2__)
// table[j & 7] of eight numbers, in each lane.
CK_INLINE Vec<float> look_up_8(const float (&table)[8], BitVec<float> j) {
  __m256 numbers = _mm256_load_ps(table);
  asm("" : "+x"(numbers));  // in a register: read from memory at every use, they cost a tenth of the whole exponential
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)j, _mm512_maskz_broadcast_f32x8(0xffff, numbers));
#else
  return (Vec<float>)_mm256_permutevar8x32_ps(numbers, (__m256i)j);
#endif
}

// 2^x = 2^(n / 8) 2^f with |f| <= 1/16: three terms fewer than without the table, and its factor is there before them.
template <int N>
CK_INLINE void exp2(Vec<float> (&x)[N]) {
  constexpr float kRound = 1572864.0f;  // 1.5 * 2^20: adding it rounds to eighths, whose number n is in the low bits
  // Minimax polynomial of 2^f on [-1/16, 1/16], 1 at 0: relative error 2.6e-8 before rounding.
  constexpr float kCoefficients[] = {5.549622e-2f, 2.4025763e-1f, 6.9314721e-1f};
  // 2^(j / 8), its bits less j << 20: those come back with n << 20.
  alignas(32) static constexpr float kPowers[8] = {1.0f,           0x1.f72b84p-1f, 0x1.f06fep-1f,  0x1.ebfdaep-1f,
                                                   0x1.ea09e6p-1f, 0x1.eace54p-1f, 0x1.ee89fap-1f, 0x1.f5818ep-1f};
  Vec<float> shifted[N], power[N], y[N];
  for (int i = 0; i < N; ++i) x[i] = max<float>(broadcast(-127.0f), x[i]);
  for (int i = 0; i < N; ++i) shifted[i] = x[i] + kRound;
  for (int i = 0; i < N; ++i) x[i] -= shifted[i] - kRound;  // f
  for (int i = 0; i < N; ++i) {
    const BitVec<float> n = (BitVec<float>)shifted[i];
    power[i] = (Vec<float>)((BitVec<float>)look_up_8(kPowers, n) + (n << 20));
  }
  for (int i = 0; i < N; ++i) y[i] = x[i] * kCoefficients[0] + kCoefficients[1];
  for (int i = 0; i < N; ++i) y[i] = y[i] * x[i] + kCoefficients[2];
  for (int i = 0; i < N; ++i) x[i] *= power[i];
  for (int i = 0; i < N; ++i) x[i] = y[i] * x[i] + power[i];
}
#else
template <int N>
CK_INLINE void exp2(Vec<float> (&x)[N]) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  // Minimax polynomial of 2^f on [-1/2, 1/2], 1 at 0: relative error 2e-9 before rounding.
  constexpr float kCoefficients[] = {1.339887445e-3f, 9.618437358e-3f, 5.550332471e-2f, 2.402264791e-1f, 6.931472029e-1f, 1.0f};
  Vec<float> shifted[N], y[N];
  for (int i = 0; i < N; ++i) x[i] = max<float>(broadcast(-127.0f), x[i]);
  for (int i = 0; i < N; ++i) shifted[i] = x[i] + kRound;
  for (int i = 0; i < N; ++i) x[i] -= shifted[i] - kRound;  // in [-1/2, 1/2]
  for (int i = 0; i < N; ++i) y[i] = x[i] * 1.535336182e-4f + kCoefficients[0];
#pragma GCC unroll 8
  for (int c = 1; c < 6; ++c) {
    for (int i = 0; i < N; ++i) y[i] = y[i] * x[i] + kCoefficients[c];
  }
  for (int i = 0; i < N; ++i) x[i] = (Vec<float>)((BitVec<float>)y[i] + ((BitVec<float>)shifted[i] << 23));
}
#endif

CK_INLINE Vec<float> exp2(Vec<float> x) {
  Vec<float> one[1] = {x};
  exp2(one);
  return one[0];
}

CK_INLINE Vec<double> exp2(Vec<double> x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  x = max<double>(broadcast(-1023.0), x);
  const Vec<double> shifted = x + kRound;
  const Vec<double> f = (x - (shifted - kRound)) * 0.693147180559945309417;  // e^f, |f| <= ln(2) / 2
  // Taylor series: the first omitted term is below 2^-55.
  Vec<double> y = broadcast(1.0 / 6227020800.0);
  y = y * f + 1.0 / 479001600.0;
  y = y * f + 1.0 / 39916800.0;
  y = y * f + 1.0 / 3628800.0;
  y = y * f + 1.0 / 362880.0;
  y = y * f + 1.0 / 40320.0;
  y = y * f + 1.0 / 5040.0;
  y = y * f + 1.0 / 720.0;
  y = y * f + 1.0 / 120.0;
  y = y * f + 1.0 / 24.0;
  y = y * f + 1.0 / 6.0;
  y = y * f + 0.5;
  y = y * f + 1.0;
  y = y * f + 1.0;
  return (Vec<double>)((BitVec<double>)y + ((BitVec<double>)shifted << 52));
}

template <int N>
CK_INLINE void exp2(Vec<double> (&x)[N]) {
  for (int i = 0; i < N; ++i) x[i] = exp2(x[i]);
}

// log2(x) for x >= 0: relative error of a few roundings; log2(0) = -inf, log2(inf) = inf, NaN stays. Subnormal numbers count as
// 0.
template <typename T>
CK_INLINE Vec<T> log2(Vec<T> x) {
  using Int = BitsOf<T>;
  typedef Int Bits __attribute__((vector_size(kVectorBytes)));
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr T kSqrtHalf = T(0.70710678118654752440);
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(f), f = (m - 1) / (m + 1), |f| <= 0.1716.
  const Bits bits = (Bits)x;
  const Bits below = (Bits)broadcast(kSqrtHalf);
  const Bits exponent = (bits - below) >> kMantissa;
  const Vec<T> m = (Vec<T>)(bits - (exponent << kMantissa));
  const Vec<T> f = (m - T(1)) / (m + T(1)), g = f * f;
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 11;
  Vec<T> series = broadcast(T(1) / T(2 * kTerms + 1));
  for (int j = kTerms - 1; j >= 0; --j) series = series * g + T(1) / T(2 * j + 1);
  constexpr T kTwoLog2e = T(2.88539008177792681472);
  const Vec<T> result = __builtin_convertvector(exponent, Vec<T>) + f * series * kTwoLog2e;
  const Vec<T> tiny = broadcast(std::numeric_limits<T>::min()), huge = broadcast(std::numeric_limits<T>::max());
  return x < tiny ? broadcast(-std::numeric_limits<T>::infinity()) : x <= huge ? result : x;
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
