// Operands of products in the sets that multiply 16-bit numbers: pairs along the depth, two of them in the place of one float.
//
// COMP_KERNELS_PAIRS is their type, bfloat16 or float16. Where it is not defined a pair is a single number, and nothing here does
// anything.
#pragma once

#include "common/cpu/half.h"
#include "common/cpu/simd.h"

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

// Values 2 i and 2 i + 1 of a row -> pair i, for `columns` values, whole vectors. In place, too.
CK_INLINE void pair_columns(const float* x, float* pairs, int64_t columns) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + 2 * L <= columns; i += 2 * L) store(pairs + i / 2, pair_columns(load(x + i), load(x + i + L)));
  if (i < columns) {
    const __m256i last = rounded(COMP_KERNELS_PAIRS{}, load(x + i));
    std::memcpy(pairs + i / 2, &last, sizeof last);
  }
}

// Values of two rows, `even` and `odd` along the depth -> one vector of pairs.
CK_INLINE Vec<float> pair_rows(Vec<float> even, Vec<float> odd) {
  alignas(64) static constexpr uint16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xffffffff, _mm512_load_si512(kZip), rounded(COMP_KERNELS_PAIRS{}, even, odd));
}

// Rows x [rows, columns], `stride` apart -> pairs of rows [rows / 2 rounded up, columns], `stride` apart; a row without a partner
// is paired with zeros. `columns`: whole vectors. In place, too.
CK_INLINE void pair_rows(const float* x, int64_t rows, int64_t columns, int64_t stride, float* pairs) {
  for (int64_t i = 0; i < rows; i += 2, x += 2 * stride, pairs += stride) {
    for (int64_t d = 0; d < columns; d += kLanes<float>) {
      store(pairs + d, pair_rows(load(x + d), i + 1 < rows ? load(x + stride + d) : Vec<float>{}));
    }
  }
}

#else

constexpr int kPack = 1;

template <typename V>
CK_INLINE V multiply_add(V x, V y, V sum) {
  return sum + x * y;
}

#endif

}  // namespace comp_kernels::COMP_KERNELS_ISA
