// Operands of products in the sets that multiply 16-bit numbers: pairs along the depth, two of them in the place of one float.
//
// COMP_KERNELS_PAIRS is their type, bfloat16 or float16. Where it is not defined a pair is a single number, and nothing here does
// anything. With terms (terms.h) the numbers are floats, and an operand is three of them.
#pragma once

#include "common/cpu/half.h"
#include "common/cpu/simd.h"
#include "terms.h"

namespace comp_kernels::COMP_KERNELS_ISA {

#ifdef COMP_KERNELS_PAIRS

constexpr int kPack = 2;  // values of an operand's element

#ifndef COMP_KERNELS_TILES
// sum + x y per lane; of pairs, sum + x0 y0 + x1 y1.
CK_INLINE Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}
#endif

// One vector, or two one after the other, rounded to 16 bits.
CK_INLINE __m256i rounded(bfloat16, Vec<float> x) { return (__m256i)_mm512_cvtneps_pbh(x); }
CK_INLINE __m256i rounded(float16, Vec<float> x) {
  return _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CK_INLINE __m512i rounded(bfloat16, Vec<float> first, Vec<float> second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
CK_INLINE __m512i rounded(float16 type, Vec<float> first, Vec<float> second) {
  const __m512i low = _mm512_maskz_broadcast_i64x4(0xff, rounded(type, first));
  return _mm512_mask_broadcast_i64x4(low, 0xf0, rounded(type, second));
}

// Two vectors of a row -> one of pairs of neighbours.
CK_INLINE Vec<float> pair_columns(Vec<float> first, Vec<float> second) {
  return (Vec<float>)rounded(COMP_KERNELS_PAIRS{}, first, second);
}

// The first `count` of 32 numbers.
CK_INLINE __mmask32 first_numbers(int64_t count) { return count >= 32 ? 0xffffffffu : count > 0 ? (1u << count) - 1 : 0; }

// Values of two rows, `even` and `odd` along the depth -> one vector of pairs.
CK_INLINE Vec<float> pair_rows(Vec<float> even, Vec<float> odd) {
  alignas(64) static constexpr uint16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xffffffff, _mm512_load_si512(kZip), rounded(COMP_KERNELS_PAIRS{}, even, odd));
}

#ifndef COMP_KERNELS_TERMS
// Two rows of `count` 16-bit numbers -> pairs, with zeros from `count` to `columns`, whole vectors. `odd` may be null: zeros.
CK_INLINE void pair_rows(const void* even, const void* odd, int64_t count, float* pairs, int64_t columns) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const uint16_t *a = static_cast<const uint16_t*>(even), *b = static_cast<const uint16_t*>(odd);
  for (int64_t d = 0; d < columns; d += 32) {
    const __mmask32 valid = first_numbers(count - d);
    const __m512i x = _mm512_maskz_loadu_epi16(valid, a + d);
    const __m512i y = b == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(valid, b + d);
    store(pairs + d, (Vec<float>)_mm512_permutex2var_epi16(x, low, y));
    if (d + 16 < columns) store(pairs + d + 16, (Vec<float>)_mm512_permutex2var_epi16(x, high, y));
  }
}
#endif

CK_INLINE Vec<float> negated(Vec<float> pairs) {
  return (Vec<float>)_mm512_xor_si512((__m512i)pairs, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
}

// x [count] -> y [whole], 16-bit numbers, zeros from `count` on.
CK_INLINE void copy_row(const void* x, int64_t count, void* y, int64_t whole) {
  for (int64_t d = 0; d < whole; d += 32) {
    const __m512i numbers = _mm512_maskz_loadu_epi16(first_numbers(count - d), static_cast<const uint16_t*>(x) + d);
    _mm512_mask_storeu_epi16(static_cast<uint16_t*>(y) + d, first_numbers(whole - d), numbers);
  }
}

#else

constexpr int kPack = 1;

template <typename V>
CK_INLINE V negated(V x) {
  return -x;
}

template <typename V>
CK_INLINE V multiply_add(V x, V y, V sum) {
  return sum + x * y;
}

#endif

}  // namespace comp_kernels::COMP_KERNELS_ISA
