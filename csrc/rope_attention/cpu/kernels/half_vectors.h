// P V for heads whose channels are an odd number of half vectors: 72 are four and a half vectors of 16, and would be multiplied as
// five.
//
// Two elements of the depth, tokens or pairs of tokens, then take the place of one (ElementPair, matmul.h), and a vector is eight
// channels of both. Rows of V are zipped in twos, P is read as it lies, and a row of the result has two sums of each channel side
// by side, to be added at last.
#pragma once

#include <type_traits>
#include <utility>

#include "common/cpu/simd.h"
#include "matmul.h"

namespace comp_kernels::COMP_KERNELS_ISA {

template <typename T>
constexpr bool kMayHalve = kVectorBytes == 64 && !kTiles && std::is_same_v<T, float>;

// How rows of V and of P V lie in memory.
template <typename T>
struct ValueRows {
  bool halves;
  int64_t vectors;       // of a row
  int64_t stride;        // of rows of P V, in numbers
  int64_t value_stride;  // of rows of V, likewise
  int64_t tokens;        // in a row of V

  explicit ValueRows(int64_t channels) {
    constexpr int64_t L = kLanes<T>, kHalf = L / 2;
    halves = kMayHalve<T> && (channels + kHalf - 1) / kHalf % 2 == 1;
    vectors = halves ? (channels + kHalf - 1) / kHalf : (channels + L - 1) / L;
    stride = row_stride<T>(vectors * L);
    value_stride = kTerms * stride;
    tokens = halves ? 2 * kPack : kPack;
  }
};

// C (+)= P V for `rows` rows of P, `depth` elements each (matmul.h).
template <typename T>
void product_with_values(Result result, int64_t rows, int64_t depth, const T* p, int64_t p_stride, const T* values,
                         const ValueRows<T>& layout, T* c, RowsAhead& ahead) {
  if constexpr (kMayHalve<T>) {
    if (layout.halves) {
      product<ElementPair, RowsOfA::strided, RowsOfB::in_rows>(result, rows, layout.vectors, (depth + 1) / 2,
                                                               reinterpret_cast<const ElementPair*>(p), p_stride / 2,
                                                               reinterpret_cast<const ElementPair*>(values), layout.stride / 2,
                                                               reinterpret_cast<ElementPair*>(c), layout.stride / 2, ahead);
      return;
    }
  }
  product<T, RowsOfA::strided, RowsOfB::in_rows>(result, rows, layout.vectors, depth, p, p_stride, values, layout.value_stride, c,
                                                 layout.stride, ahead);
}

// [a0 b0 a1 b1 ..], of the lower or the upper halves of a and b.
template <typename T, bool kUpper, int... kLane>
CK_INLINE Vec<T> zip(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  constexpr int L = kLanes<T>, kFrom = kUpper ? L / 2 : 0;
  return SHUFFLE(T, a, b, (kLane % 2 * L + kFrom + kLane / 2)...);
}
// [a0 + a1, a2 + a3, .. b0 + b1, ..]
template <typename T, int... kLane>
CK_INLINE Vec<T> add_neighbours(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  const Vec<T> even = SHUFFLE(T, a, b, (2 * kLane)...), odd = SHUFFLE(T, a, b, (2 * kLane + 1)...);
  return even + odd;
}

// Rows x [rows, channels], whole vectors, -> zipped in twos, the last with zeros.
template <typename T>
void zip_rows(const T* x, int64_t rows, int64_t stride, const ValueRows<T>& layout, T* to) {
  constexpr int L = kLanes<T>;
  constexpr auto kLane = std::make_integer_sequence<int, L>{};
  for (int64_t i = 0; i < rows; i += 2, x += 2 * stride, to += layout.stride) {
    for (int64_t n = 0; n < layout.vectors; n += 2) {
      const Vec<T> a = load(x + n / 2 * L), b = i + 1 < rows ? load(x + stride + n / 2 * L) : Vec<T>{};
      store(to + n * L, zip<T, false>(a, b, kLane));
      if (n + 1 < layout.vectors) store(to + (n + 1) * L, zip<T, true>(a, b, kLane));
    }
  }
}

// A row of the result, its two sums of each channel added, in place.
template <typename T>
void add_zipped(T* x, const ValueRows<T>& layout) {
  constexpr int L = kLanes<T>;
  for (int64_t n = 0; n < layout.vectors; n += 2) {
    const Vec<T> low = load(x + n * L), high = n + 1 < layout.vectors ? load(x + (n + 1) * L) : Vec<T>{};
    store(x + n / 2 * L, add_neighbours<T>(low, high, std::make_integer_sequence<int, L>{}));
  }
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
