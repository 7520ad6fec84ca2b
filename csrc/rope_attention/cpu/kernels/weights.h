// The weights 2^x, x <= 0, of attention: exponentials as precise as the products that use them can tell. Under NoSubnormalResults
// they are 0 below the range of normal numbers, which make a product 80 times as slow on Intel's processors.
#pragma once

#include "common/cpu/half.h"
#include "common/cpu/simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

constexpr int kTogether = 2;  // vectors of scores whose exponentials are taken together

// `scores` rounded up to such vectors: the last of them may lie beyond the keys.
template <typename T>
constexpr int64_t whole_scores(int64_t scores) {
  constexpr int64_t kWhole = kTogether * kLanes<T>;
  return (scores + kWhole - 1) / kWhole * kWhole;
}

#if defined(COMP_KERNELS_PAIRS) && !defined(COMP_KERNELS_TERMS)

// Minimax polynomials of 2^f on [0, 1), exact at both ends: to 3.4e-6, a thousandth of what bfloat16 keeps, and to 1.8e-7 for float16.
// That is more than weights need; but lse is float32's, and where logits are small, all weights near 1, plain PyTorch has it to 1e-4
// in bfloat16 and to 1e-6 in float16.
template <typename S>
struct Powers {
  static constexpr float kCoefficients[] = {1.355707552e-2f, 5.203069001e-2f, 2.413797826e-1f, 6.930324435e-1f, 1.0f};
};
template <>
struct Powers<float16> {
  static constexpr float kCoefficients[] = {1.879318617e-3f, 8.990995586e-3f, 5.581867695e-2f,
                                            2.401592731e-1f, 6.931517124e-1f, 1.0f};
};

// x = floor(x) + f: half the instructions of exp2, for beside products of 16-bit numbers exponentials take more of the time. Exactly
// 0 for -inf; NaN stays NaN.
template <int N>
CK_INLINE void weights_of(Vec<float> (&x)[N]) {
  constexpr auto& kCoefficients = Powers<COMP_KERNELS_PAIRS>::kCoefficients;
  constexpr int kCount = sizeof(kCoefficients) / sizeof(float), kFraction = 0x9;  // x - floor(x)
  Vec<float> f[N], y[N];
  for (int i = 0; i < N; ++i) f[i] = (Vec<float>)_mm512_maskz_reduce_ps(0xffff, (__m512)x[i], kFraction);
  for (int i = 0; i < N; ++i) y[i] = f[i] * kCoefficients[0] + kCoefficients[1];
#pragma GCC unroll 8
  for (int c = 2; c < kCount; ++c) {
    for (int i = 0; i < N; ++i) y[i] = y[i] * f[i] + kCoefficients[c];
  }
  for (int i = 0; i < N; ++i) x[i] = (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)y[i], (__m512)x[i]);
}

#elif defined(__AVX512DQ__)

// To 1.8e-7 (exp2: 1.3e-7), in three quarters of its instructions: x = n / 32 + f with n = floor(32 x), a table of 32 for n modulo 32,
// and scaling by 2^floor(x). NaN stays NaN.
template <int N>
CK_INLINE void weights_of(Vec<float> (&x)[N]) {
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
  for (int i = 0; i < N; ++i) x[i] = (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)y[i], (__m512)x[i]);
}

#else

template <int N>
CK_INLINE void weights_of(Vec<float> (&x)[N]) {
  exp2(x);
}

#endif

template <int N>
CK_INLINE void weights_of(Vec<double> (&x)[N]) {
  exp2(x);
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
