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

}  // namespace comp_kernels::COMP_KERNELS_ISA
