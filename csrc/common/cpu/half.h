// bfloat16 and float16 as storage formats: to and from float, round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace comp_kernels::COMP_KERNELS_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

CK_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

CK_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

CK_INLINE float widen(float x) { return x; }
CK_INLINE double widen(double x) { return x; }
CK_INLINE float widen(bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
CK_INLINE float widen(float16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent's bias from 15 to 127 and normalises subnormal numbers.
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;  // infinity or NaN
  return bits_to_float(sign | (special ? 0x7f800000u | magnitude : float_to_bits(scaled)));
#endif
}

CK_INLINE void narrow(float x, float& to) { to = x; }
CK_INLINE void narrow(double x, double& to) { to = x; }
CK_INLINE void narrow(float x, bfloat16& to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u | (bits >> 16));
}
CK_INLINE void narrow(float x, float16& to) {
#ifdef __F16C__
  to.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = float_to_bits(x), sign = bits & 0x80000000u;
  const float magnitude = bits_to_float(bits ^ sign);
  uint32_t half;
  if (!(magnitude < 65520.0f)) {  // rounds to infinity; NaN
    half = magnitude == magnitude ? 0x7c00u : 0x7e00u;
  } else if (magnitude < 6.103515625e-05f) {  // subnormal: adding 1/2 leaves the value, rounded to 2^-24, in the low bits
    half = float_to_bits(magnitude + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t rebased = float_to_bits(magnitude) - (112u << 23);
    half = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>((sign >> 16) | half);
#endif
}

// A vector of numbers in any storage format.
CK_INLINE Vec<float> load_widened(const float* p) { return load(p); }
CK_INLINE Vec<double> load_widened(const double* p) { return load(p); }
CK_INLINE Vec<float> load_widened(const bfloat16* p) {
#if defined(__AVX512F__)  // one instruction where the compiler takes five
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, halves), 16);
#else
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return (Vec<float>)(__builtin_convertvector(halves, Words) << 16);
#endif
}
CK_INLINE Vec<float> load_widened(const float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> wide;
  for (int i = 0; i < kLanes<float>; ++i) wide[i] = widen(p[i]);
  return wide;
#endif
}

// The same, back again.
CK_INLINE void store_narrowed(Vec<float> x, float* to) { store(to, x); }
CK_INLINE void store_narrowed(Vec<double> x, double* to) { store(to, x); }
CK_INLINE void store_narrowed(Vec<float> x, bfloat16* to) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  const Words bits = (Words)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Halves halves = __builtin_convertvector(x == x ? rounded : 0x7fc0u | (bits >> 16), Halves);
  std::memcpy(to, &halves, sizeof halves);
#endif
}
CK_INLINE void store_narrowed(Vec<float> x, float16* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(x[i], to[i]);
#endif
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
