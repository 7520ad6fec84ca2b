// A block of scores as the kernels of sinkhorn and alignment_loss read it: wide loads from any storage format.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "comp_kernels/dtypes.h"
#include "half.h"
#include "simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

// The type arithmetic is done in.
template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

template <typename T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// A matrix of scores, or a tile of one: entry (i, k) is scores_ik * col_scale_k * factor, in bits.
template <typename S>
struct Scores {
  using T = Compute<S>;
  const S* data;  // [num_rows, num_cols], rows row_stride apart
  int64_t row_stride, num_rows, num_cols;
  const T* col_scale;  // [num_cols]; null: ones
  T factor;
};

CK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A maximum to subtract in fused exponents s * c - maximum. Beyond the whole numbers that T tells apart it was rounded by more than
// a bit, by more than exp2 can take in the end; one step lower, the largest entry is never below it, and is cut to 2^0. An infinite
// one stays, for the NaN that follows.
template <typename T>
CK_INLINE T not_above(T maximum) {
  constexpr T kWhole = T(int64_t{1} << std::numeric_limits<T>::digits);
  return std::abs(maximum) < kWhole || std::isinf(maximum) ? maximum : std::nextafter(maximum, kMinusInfinity<T>);
}

// Merges the entries of one row, plus v where given, into a running maximum and a sum of 2^(entry - maximum). The exponents are
// the same expressions, to the last bit, as in the kernels that use the result: near 1,000 a float has a spacing of 1e-4, and
// rows that are to sum to one should not feel it.
template <typename S, typename T = Compute<S>>
CK_INLINE void update_row_statistics(const Scores<S>& scores, int64_t row, const T* v, T& peak, T& sum) {
  constexpr int64_t kSegment = 1024;
  alignas(64) T entry[kSegment], scale[kSegment], shift[kSegment];
  for (int64_t begin = 0; begin < scores.num_cols; begin += kSegment) {
    const int64_t cols = std::min(kSegment, scores.num_cols - begin), padded = round_up(cols, kLanes<T>);
    const S* s = scores.data + row * scores.row_stride + begin;
    for (int64_t k = 0; k < cols; ++k) {
      entry[k] = widen(s[k]);
      scale[k] = scores.col_scale ? scores.col_scale[begin + k] * scores.factor : scores.factor;
      shift[k] = v ? v[begin + k] : T(0);
    }
    for (int64_t k = cols; k < padded; ++k) entry[k] = 0, scale[k] = 0, shift[k] = kMinusInfinity<T>;
    Vec<T> top = broadcast(kMinusInfinity<T>);
    for (int64_t k = 0; k < padded; k += kLanes<T>) {
      top = max<T>(load(entry + k) * load(scale + k) + load(shift + k), top);
    }
    const T segment_peak = not_above(reduce_max<T>(top));
    if (segment_peak == kMinusInfinity<T>) {  // nothing but -inf, which adds nothing, and NaN, which no maximum sees
      for (int64_t k = 0; k < cols; ++k) {
        if (std::isnan(entry[k] * scale[k] + shift[k])) sum = std::numeric_limits<T>::quiet_NaN();
      }
      continue;
    }
    if (segment_peak > peak) {
      if (peak != kMinusInfinity<T>) sum *= std::exp2(peak - segment_peak);
      peak = segment_peak;
    }
    Vec<T> total{};
    for (int64_t k = 0; k < padded; k += kLanes<T>) {
      // At most 0 but for what rounding leaves of huge entries, once the product is fused.
      total += exp2(min<T>(broadcast(T(0)), load(entry + k) * load(scale + k) + (load(shift + k) - peak)));
    }
    sum += reduce_sum<T>(total);
  }
}

// Calls f with a value of the storage type; null, or what went wrong.
template <typename F>
inline const char* for_dtype(int64_t dtype, F&& f) {
  try {
    switch (dtype) {
      case COMP_KERNELS_FLOAT32: f(float{}); break;
      case COMP_KERNELS_FLOAT64: f(double{}); break;
      case COMP_KERNELS_BFLOAT16: f(bfloat16{}); break;
      case COMP_KERNELS_FLOAT16: f(float16{}); break;
      default: return "dtype is not one of COMP_KERNELS_*";
    }
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
  return nullptr;
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
