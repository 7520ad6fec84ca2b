// Operands of products in the sets that multiply bfloat16: pairs along the depth, two bfloat16 in the place of one float.
//
// Where COMP_KERNELS_BFLOAT16_PAIRS is not defined a pair is a single number, and nothing here does anything.
#pragma once

#include "common/cpu/simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

#ifdef COMP_KERNELS_BFLOAT16_PAIRS

constexpr int kPack = 2;  // values of an operand's element

// sum + x y per lane; of pairs, sum + x0 y0 + x1 y1.
CK_INLINE Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}

// Two vectors of a row -> one of pairs of neighbours.
CK_INLINE Vec<float> pair_columns(Vec<float> first, Vec<float> second) { return (Vec<float>)_mm512_cvtne2ps_pbh(second, first); }

// Values 2 i and 2 i + 1 of a row -> pair i, for `columns` values, whole vectors. In place, too.
CK_INLINE void pair_columns(const float* x, float* pairs, int64_t columns) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + 2 * L <= columns; i += 2 * L) store(pairs + i / 2, pair_columns(load(x + i), load(x + i + L)));
  if (i < columns) {
    const __m256bh last = _mm512_cvtneps_pbh(load(x + i));
    std::memcpy(pairs + i / 2, &last, sizeof last);
  }
}

// Values of two rows, `even` and `odd` along the depth -> one vector of pairs.
CK_INLINE Vec<float> pair_rows(Vec<float> even, Vec<float> odd) {
  alignas(64) static constexpr uint16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xffffffff, _mm512_load_si512(kZip), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Rows x [rows, columns], `stride` apart -> pairs of rows [rows / 2 rounded up, columns], `stride` apart; a row without a partner
// is paired with zeros. `columns`: whole vectors.
CK_INLINE void pair_rows(const float* x, int64_t rows, int64_t columns, int64_t stride, float* pairs) {
  for (int64_t i = 0; i < rows; i += 2, x += 2 * stride, pairs += stride) {
    for (int64_t d = 0; d < columns; d += kLanes<float>) {
      store(pairs + d, pair_rows(load(x + d), i + 1 < rows ? load(x + stride + d) : Vec<float>{}));
    }
  }
}

#ifdef COMP_KERNELS_TILES

// 2^x for x <= 0 to 3e-6, a thousandth of what bfloat16 keeps, in half the instructions of exp2: beside tiles, exponentials are the
// larger part. x = floor(x) + f, and a minimax polynomial of 2^f on [0, 1), 1 at 0. Exactly 0 for -inf; NaN stays NaN.
template <int N>
CK_INLINE void short_exp2(Vec<float> (&x)[N]) {
  constexpr float kCoefficients[] = {1.342668724e-2f, 5.224246943e-2f, 2.412802070e-1f, 6.930448446e-1f, 1.0f};
  constexpr int kFraction = 0x9;  // x - floor(x)
  Vec<float> f[N], y[N];
  for (int i = 0; i < N; ++i) f[i] = (Vec<float>)_mm512_maskz_reduce_ps(0xffff, (__m512)x[i], kFraction);
  for (int i = 0; i < N; ++i) y[i] = f[i] * kCoefficients[0] + kCoefficients[1];
#pragma GCC unroll 8
  for (int c = 2; c < 5; ++c) {
    for (int i = 0; i < N; ++i) y[i] = y[i] * f[i] + kCoefficients[c];
  }
  for (int i = 0; i < N; ++i) x[i] = (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)y[i], (__m512)x[i]);
}

#endif

#else

constexpr int kPack = 1;

template <typename V>
CK_INLINE V multiply_add(V x, V y, V sum) {
  return sum + x * y;
}

#endif

#if defined(__AVX512DQ__) && !defined(COMP_KERNELS_BFLOAT16_PAIRS)
#define COMP_KERNELS_SCALED_EXP2

// 2^x for x <= 0 as exp2, in three quarters of its instructions: x = n / 32 + f with n = floor(32 x), a table of 32 for n modulo 32,
// and scaling by 2^floor(x). 0 below the range of normal numbers: others make a multiply-add 80 times as slow. NaN stays NaN.
template <int N>
CK_INLINE void scaled_exp2(Vec<float> (&x)[N]) {
  constexpr float kFloor = 393216.0f;  // 1.5 * 2^18: adding it, rounded down, leaves n in the low bits
  constexpr int kFraction = 0x59;  // x - floor(32 x) / 32
  // Minimax polynomial of 2^f on [0, 1/32), 1 at 0: relative error 6.5e-8 before rounding.
  constexpr float kCoefficients[] = {2.4265201e-1f, 6.9312374e-1f};
  // 2^(j / 32)
  alignas(64) static constexpr float kPowers[32] = {
      1.0f,          0x1.059b0ep0f, 0x1.0b5586p0f, 0x1.11301ep0f, 0x1.172b84p0f, 0x1.1d4874p0f, 0x1.2387a6p0f, 0x1.29e9ep0f,
      0x1.306fep0f,  0x1.371a74p0f, 0x1.3dea64p0f, 0x1.44e086p0f, 0x1.4bfdaep0f, 0x1.5342b6p0f, 0x1.5ab07ep0f, 0x1.6247ecp0f,
      0x1.6a09e6p0f, 0x1.71f75ep0f, 0x1.7a1148p0f, 0x1.82589ap0f, 0x1.8ace54p0f, 0x1.93737cp0f, 0x1.9c4918p0f, 0x1.a5503cp0f,
      0x1.ae89fap0f, 0x1.b7f77p0f,  0x1.c199bep0f, 0x1.cb720ep0f, 0x1.d5818ep0f, 0x1.dfc974p0f, 0x1.ea4afap0f, 0x1.f50766p0f};
  __m512 low = _mm512_load_ps(kPowers), high = _mm512_load_ps(kPowers + 16);
  asm("" : "+v"(low), "+v"(high));  // in registers, as in look_up_8
  Vec<float> shifted[N], f[N], power[N], y[N];
  for (int i = 0; i < N; ++i) {
    shifted[i] = (Vec<float>)_mm512_maskz_add_round_ps(0xffff, (__m512)x[i], _mm512_set1_ps(kFloor),
                                                       _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  for (int i = 0; i < N; ++i) f[i] = (Vec<float>)_mm512_maskz_reduce_ps(0xffff, (__m512)x[i], kFraction);
  for (int i = 0; i < N; ++i) power[i] = (Vec<float>)_mm512_permutex2var_ps(low, (__m512i)shifted[i], high);
  for (int i = 0; i < N; ++i) y[i] = f[i] * kCoefficients[0] + kCoefficients[1];
  for (int i = 0; i < N; ++i) y[i] = y[i] * f[i];
  for (int i = 0; i < N; ++i) y[i] = power[i] * y[i] + power[i];
  for (int i = 0; i < N; ++i) {
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    x[i] = (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)y[i], (__m512)x[i]);
  }
}

#endif

// The weights 2^x, x <= 0, as precise as the products that use them can tell.
template <typename T, int N>
CK_INLINE void weights_of(Vec<T> (&x)[N]) {
#if defined(COMP_KERNELS_TILES)
  short_exp2(x);
#elif defined(COMP_KERNELS_SCALED_EXP2)
  if constexpr (std::is_same_v<T, float>) {
    scaled_exp2(x);
  } else {
    exp2(x);
  }
#else
  exp2(x);
#endif
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
