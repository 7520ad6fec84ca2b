// What floating point holds of E = 2^(entry + u + v): when it may be taken without a shift, and when a sum must be taken again.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/cpu/score_tile.h"

namespace comp_kernels::COMP_KERNELS_ISA {

// A column sum below this, or a row sum below this share of the largest weight, may have lost terms below the smallest normal
// number.
template <typename T>
constexpr T kLost = sizeof(T) == 4 ? T(1e-20) : T(1e-200);
// E serves while the largest x is at most this many times the smallest: what E lost below 2^-126 then stays without weight.
constexpr double kUneven = 1e12;
// Column sums of E without a shift must lie between these, and it is not tried where a sample of entries exceeds so many bits.
constexpr double kLeastSum = 1e-12, kLargestSum = 1e18;
constexpr double kSampleBits = 40;

template <typename T>
bool serves_without_shift(const T* sums, int64_t cols) {
  bool within = true;
  for (int64_t k = 0; k < cols; ++k) within &= sums[k] >= static_cast<T>(kLeastSum) && sums[k] <= static_cast<T>(kLargestSum);
  return within;
}

// Whether a column that is to receive mass, b_k, may have lost terms.
template <typename T>
bool any_lost(const T* sums, const T* b, int64_t cols) {
  bool lost = false;
  for (int64_t k = 0; k < cols; ++k) lost |= sums[k] < kLost<T> && b[k] > 0;
  return lost;
}

// Whether entries of a sample, a few rows at the first columns, leave the range in which E needs no shift.
template <typename S>
bool spans_many_bits(const Scores<S>& scores) {
  using T = Compute<S>;
  T largest = 0;
  for (int64_t i : {int64_t{0}, scores.num_rows / 2, scores.num_rows - 1}) {
    for (int64_t k = 0; k < std::min<int64_t>(scores.num_cols, 256); ++k) {
      const T scale = scores.factor * (scores.col_scale ? scores.col_scale[k] : T(1));
      largest = std::max(largest, std::abs(widen(scores.data[i * scores.row_stride + k]) * scale));
    }
  }
  return !(largest <= T(kSampleBits));
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
