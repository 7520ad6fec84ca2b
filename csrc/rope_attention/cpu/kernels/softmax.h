// The online softmax of the forward pass (Milakov and Gimelshein, arXiv 1805.02867): of a whole block of keys, or part by part.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "forward_scratch.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

// The largest of `keys` scores in each of kLanes rows.
template <typename T>
CK_INLINE Vec<T> row_maxima(T* const (&scores)[kLanes<T>], int64_t keys) {
  constexpr int L = kLanes<T>;
  const int64_t last = round_up_to_lanes<T>(keys) - L;  // the vector that may hold columns beyond the keys
  const BitVec<T> valid = first_lanes<T>(keys - last);
  Vec<T> tops[L];
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) {
    tops[r] = select<T>(valid, load(scores[r] + last), broadcast(-std::numeric_limits<T>::infinity()));
  }
  for (int64_t j = 0; j < last; j += L) {
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) tops[r] = max<T>(load(scores[r] + j), tops[r]);
  }
  return across_lanes<T>(tops, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); });
}

// One block of scores -> probabilities, unnormalised; rescales what was accumulated before where a row's maximum grows. kLanes
// rows go together: what is one number per row is one lane of a vector, and no row waits for another's maximum.
//
// The maximum is subtracted before scaling, exactly zero where it is reached: score * scale - maximum * scale, one rounded and
// one fused, can be off by more than a float's exponent for scores beyond 5e9.
template <typename T>
void online_softmax(ForwardScratch<T>& scratch, int64_t at, int64_t queries, int64_t keys, const ValueRows<T>& layout, T scale_log2,
                    bool first) {
  T *shifts = scratch.row_shift + at, *totals = scratch.row_sum + at;
  constexpr int L = kLanes<T>;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < queries; i += L) {
    const int64_t rows = min(queries - i, L);
    T* scores[L];
    for (int64_t r = 0; r < L; ++r) scores[r] = scratch.scores + (i + min(r, rows - 1)) * kScoreStride<T>;
    const Vec<T> top = row_maxima<T>(scores, keys);
    Vec<T> sums[L];
    const Vec<T> old_shift = first ? broadcast(kLowest) : load(shifts + i);
    const Vec<T> shift = max<T>(top, old_shift), fade = exp2((old_shift - shift) * scale_log2);
    store(shifts + i, shift);

    for (int64_t r = 0; r < rows; ++r) {
      T *row = scores[r], *weights = scratch.weights + (i + r) * kWeightStride<T>;
      const T shift_r = shifts[i + r];
      Vec<T> sum[kTogether] = {};
      for (int64_t j = 0; j < keys; j += kTogether * L) {
        Vec<T> e[kTogether];
#pragma GCC unroll 8
        for (int n = 0; n < kTogether; ++n) e[n] = (load(row + j + n * L) - shift_r) * scale_log2;
        if (j + kTogether * L > keys) {
          for (int n = 0; n < kTogether; ++n) e[n] = select<T>(first_lanes<T>(keys - j - n * L), e[n], broadcast(kLowest));
        }
        if constexpr (kVectorBytes == 64) {  // the next rows' scores, which their maxima would wait for; AVX2 gains nothing
          for (int n = 0; n < kTogether; ++n) __builtin_prefetch(row + L * kScoreStride<T> + j + n * L);
        }
        weights_of(e);
#pragma GCC unroll 8
        for (int n = 0; n < kTogether; ++n) sum[n] += e[n];
        store_operands(weights + j / kPack, kWeightStride<T>, e);
      }
      static_assert(kTogether == 2);
      sums[r] = sum[0] + sum[1];
    }
    for (int64_t r = rows; r < L; ++r) sums[r] = Vec<T>{};
    Vec<T> sum = across_lanes<T>(sums, [](Vec<T> a, Vec<T> b) { return a + b; });
    if (!first) {
      sum += load(totals + i) * fade;
      for (int64_t r = 0; r < rows; ++r) {
        if (fade[r] == 1) continue;
        T* out = scratch.output + (at + i + r) * layout.stride;
        for (int64_t d = 0; d < layout.vectors * L; d += L) store(out + d, load(out + d) * fade[r]);
      }
    }
    store(totals + i, sum);
  }
}

#ifdef COMP_KERNELS_TILES

// Exponents up to which score * scale - shift * scale, one rounded and one fused, is exact enough for 16-bit numbers.
constexpr float kMostShift = 4096;

// Weights at which shifts have to grow: 2^32, for sums have room for far more, and 2^8 in float16, which ends at 2^16.
constexpr float kMostWeight = std::is_same_v<COMP_KERNELS_PAIRS, float16> ? 0x1p8f : 0x1p32f;

// Scores of a part -> probabilities with the shifts that the rows have, as pairs, rows kWeightStride apart; adds their sums to
// part_sums. False if one of them is too large or not a number.
CK_INLINE bool weights_of_part(ForwardScratch<float>& scratch, int64_t at, int64_t queries, int64_t keys, float scale_log2,
                               float* weights) {
  constexpr int L = kLanes<float>;
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Vec<float> largest{};
  for (int64_t i = 0; i < queries; ++i) {
    const float* row = scratch.part + i * kPartStride;
    float* to = weights + i * kWeightStride<float>;
    const float shift = kTerms > 1 ? scratch.row_shift[at + i] : scratch.row_shift[at + i] * scale_log2;
    Vec<float> sum[kTogether] = {load(scratch.part_sums + i * L)};
    for (int64_t j = 0; j < keys; j += kTogether * L) {
      Vec<float> e[kTogether];
#pragma GCC unroll 8
      for (int n = 0; n < kTogether; ++n) {
        const Vec<float> score = load(row + j + n * L);
        e[n] = kTerms > 1 ? (score - shift) * scale_log2 : score * scale_log2 - shift;
      }
      if (j + kTogether * L > keys) {
        for (int n = 0; n < kTogether; ++n) e[n] = select<float>(first_lanes<float>(keys - j - n * L), e[n], broadcast(kLowest));
      }
      weights_of(e);
#pragma GCC unroll 8
      for (int n = 0; n < kTogether; ++n) sum[n] += e[n];
      store_operands(to + j / kPack, kWeightStride<float>, e);
    }
    const Vec<float> total = sum[0] + sum[1];
    store(scratch.part_sums + i * L, total);
    // The bits of numbers that are not negative are in their order, and NaN is beyond.
    largest = (Vec<float>)_mm512_maskz_max_epu32(0xffff, (__m512i)largest, (__m512i)total);
  }
  return _mm512_cmp_ps_mask((__m512)largest, _mm512_set1_ps(kMostWeight), _CMP_LE_OQ) == 0xffff;
}

// The shifts of a block: if it is the first, the largest scores of its first part. False if they are too large for weights_of_part.
CK_INLINE bool shifts_of_part(ForwardScratch<float>& scratch, int64_t at, int64_t queries, int64_t keys, float scale_log2,
                              bool first) {
  constexpr int L = kLanes<float>;
  for (int64_t i = 0; i < queries; i += L) {
    if (first) {
      float* scores[L];
      for (int64_t r = 0; r < L; ++r) scores[r] = scratch.part + min(i + r, queries - 1) * kPartStride;
      store(scratch.row_shift + at + i, row_maxima<float>(scores, keys));
    }
    if constexpr (kTerms == 1) {
      const __m512 bits = _mm512_abs_ps((__m512)(load(scratch.row_shift + at + i) * scale_log2));
      if (_mm512_cmp_ps_mask(bits, _mm512_set1_ps(kMostShift), _CMP_LE_OQ) != 0xffff) return false;
    }
  }
  return true;
}

// S and the softmax of one block of keys, part by part: a part's scores do not leave the first-level cache. The shift of a row is the
// largest score of the first part that it meets, and stays: what the weights are divided by in the end need not be the largest of
// them. So no score is read for a maximum, and nothing is rescaled (FlashAttention-4 leaves out most rescaling likewise).
//
// False, with nothing changed that counts, where a shift has to grow or exponents need more care; online_softmax then does the
// whole block.
inline bool softmax_by_parts(ForwardScratch<float>& scratch, int64_t at, int64_t queries, int64_t keys, const float* panels,
                             Depth depth, int64_t query_stride, float scale_log2, bool first) {
  constexpr int L = kLanes<float>;
  const int64_t step = block_length(keys, kPartKeys, kPartMultiple);
  std::fill_n(scratch.part_sums, kQueriesTogether * L, 0.0f);
  for (int64_t begin = 0; begin < keys; begin += step) {
    const int64_t in_part = min(keys - begin, step);
    product<float, RowsOfA::strided, RowsOfB::in_panels>(
        Result::overwritten, queries, round_up_to_lanes<float>(in_part) / L, depth, scratch.query + at * query_stride, query_stride,
        panels + begin * depth.elements(), 0, scratch.part, kPartStride, scratch.ahead);
    if (begin == 0 && !shifts_of_part(scratch, at, queries, in_part, scale_log2, first)) return false;
    if (!weights_of_part(scratch, at, queries, in_part, scale_log2, scratch.weights + begin / kPack)) return false;
  }
  for (int64_t i = 0; i < queries; i += L) {
    Vec<float> sums[L];
    for (int r = 0; r < L; ++r) sums[r] = load(scratch.part_sums + (i + r) * L);
    const Vec<float> sum = across_lanes<float>(sums, [](Vec<float> a, Vec<float> b) { return a + b; });
    store(scratch.row_sum + at + i, first ? sum : load(scratch.row_sum + at + i) + sum);
  }
  return true;
}

#else

template <typename T>
bool softmax_by_parts(ForwardScratch<T>&, int64_t, int64_t, int64_t, const T*, Depth, int64_t, T, bool) {
  return false;
}

#endif

}  // namespace
}  // namespace comp_kernels::COMP_KERNELS_ISA
