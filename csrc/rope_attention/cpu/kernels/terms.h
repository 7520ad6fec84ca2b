// float32, and float16, on tiles that multiply bfloat16: a number as the sum of three (Henry, Tang, Heinecke, arXiv 1904.06376).
//
// Only the set that is compiled with COMP_KERNELS_TERMS does so. An operand is three of pairs of bfloat16, one per term, and six of
// the nine products are summed (tiles.h): together they are as precise as float32 products that are summed in float32.
#pragma once

#include "common/cpu/half.h"
#include "common/cpu/simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

#ifdef COMP_KERNELS_TERMS

constexpr int kTerms = 3;
constexpr int64_t kApart = 16;  // numbers that are paired along a row, so that two vectors of them are one of pairs, lane by lane

typedef uint32_t Words __attribute__((vector_size(64)));

// A bfloat16 has 8 bits of a float's 24: the upper ones, what is left rounded to the nearest, and the rest, 2^-7 and 2^-16 of x at
// most. (Rounding first would make the largest numbers infinite.) They are floats still, with lower halves of zero.
CK_INLINE void split(Vec<float> x, Vec<float> (&terms)[kTerms]) {
  constexpr int kUpperHalf = -0x10000;
  terms[0] = (Vec<float>)((BitVec<float>)x & kUpperHalf);
  x -= terms[0];
  terms[1] = (Vec<float>)(((BitVec<float>)x + 0x8000) & kUpperHalf);
  terms[2] = x - terms[1];
}

// Two vectors -> pairs, by terms.
CK_INLINE void split_pairs(Vec<float> first, Vec<float> second, Vec<float> (&pairs)[kTerms]) {
  Vec<float> a[kTerms], b[kTerms];
  split(first, a);
  split(second, b);
  for (int t = 0; t < kTerms; ++t) pairs[t] = (Vec<float>)((Words)a[t] >> 16 | (Words)b[t]);
}

// The same, stored `term` apart.
CK_INLINE void store_pairs(float* to, int64_t term, Vec<float> first, Vec<float> second) {
  Vec<float> pairs[kTerms];
  split_pairs(first, second, pairs);
  for (int t = 0; t < kTerms; ++t) store(to + t * term, pairs[t]);
}

// The first `count` of a vector's numbers, and zeros.
CK_INLINE __mmask16 first_floats(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1); }
CK_INLINE Vec<float> load_first(const float* x, int64_t count) { return (Vec<float>)_mm512_maskz_loadu_ps(first_floats(count), x); }
CK_INLINE Vec<float> load_first(const float16* x, int64_t count) {
  const __m256i halves = _mm256_maskz_loadu_epi16(first_floats(count), x);
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, halves);
}

// One term of two rows of `count` numbers, pairs along the rows -> pairs of one number from each, with zeros from `count` to
// `columns`, whole vectors. `odd` may be null: zeros.
CK_INLINE void pair_rows(const float* even, const float* odd, int64_t count, float* pairs, int64_t columns) {
  for (int64_t d = 0; d < columns; d += 2 * kApart) {
    const int64_t apart = min(kApart, (count - d) / 2);
    const Words x = (Words)load(even + d / 2), y = odd == nullptr ? Words{} : (Words)load(odd + d / 2);
    store(pairs + d, (Vec<float>)((x & 0xffff) | y << 16));
    if (d + kApart < columns) store(pairs + d + kApart, Vec<float>{});
    _mm512_mask_storeu_ps(pairs + d + apart, first_floats(apart), (__m512)(x >> 16 | (y & 0xffff0000u)));
  }
}

#else

constexpr int kTerms = 1;
constexpr int64_t kApart = 1;

#endif

}  // namespace comp_kernels::COMP_KERNELS_ISA
