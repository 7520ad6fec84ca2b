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

#else

constexpr int kPack = 1;

template <typename V>
CK_INLINE V multiply_add(V x, V y, V sum) {
  return sum + x * y;
}

#endif

}  // namespace comp_kernels::COMP_KERNELS_ISA
