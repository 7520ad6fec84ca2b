// Small matrix products in registers: C[m, n] (+)= sum_k A[m, k] B[k, n], the core of the attention kernels.
//
// A tile of C (rows x 1 to 5 vectors) stays in registers over the whole depth; per step of k the tile costs one load per
// vector of B and one broadcast per row of A. The tile is as tall as the register file allows, so that the loads hide behind
// the multiply-adds. B is read in column panels as wide as a tile (panel_vectors): as packed panels, [k][panel width] one after
// another, or in place from rows.
//
// An element of A or B is a number, or in the sets that multiply bfloat16 a pair of numbers (pairs.h); `depth` counts elements.
#pragma once

#include <algorithm>

#include "common/cpu/simd.h"
#include "pairs.h"
#include "rows_ahead.h"
#include "tiles.h"

namespace comp_kernels::COMP_KERNELS_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Whether panels are three to five vectors wide where there are as many. With 32 registers of 64 bytes, 8 x 3 and 6 x 4 tiles have
// as many multiply-adds per step as 12 x 2 and need fewer instructions and loads for them.
constexpr bool kWidePanels = kVectorBytes == 64 && kPack == 1;

// Rows of a register tile that is 1 to 5 vectors wide: accumulators, one row of B and one broadcast fill the registers. Of 32
// registers some are left over: 12 rows divide blocks better than 14. (16 registers have no panels of four or five.)
constexpr int tile_rows(int vectors) {
  constexpr int kOf32[] = {16, 12, 8, 6, 5}, kOf16[] = {8, 6, 4};
  return kTiles ? 16 : (kRegisters == 32 ? kOf32 : kOf16)[vectors - 1];
}
constexpr int kTileRows = tile_rows(kWidePanels ? 3 : 2);  // of most tiles

// Two elements of an operand as one (half_vectors.h): a vector is kLanes of such pairs.
struct ElementPair {
  float elements[2];
};
template <>
struct VectorTypes<ElementPair> : VectorTypes<float> {};

template <typename T>
CK_INLINE Vec<T> broadcast_element(const T& x) {
  return broadcast<T>(x);
}
template <>
CK_INLINE Vec<ElementPair> broadcast_element(const ElementPair& x) {
  int64_t both;
  std::memcpy(&both, &x, sizeof both);
  return (Vec<float>)(BitVec<double>{} + both);
}

enum class RowsOfA { strided, transposed };     // A[m, k] at a[m * stride + k], or at a[k * stride + m]
enum class RowsOfB { in_panels, in_rows };      // B packed by panels, or B[k, n] at b[k * stride + n]
enum class Result { overwritten, accumulated };  // C = A B, or C += A B

// Steps of k per round of the loop: with AVX-512, two save 1 to 3 %. (AVX2 gains nothing.)
constexpr int kStepsPerRound = kWidePanels ? 2 : 1;

// Steps of k before the tile asks for rows ahead: enough multiply-adds are waiting by then to keep the units busy meanwhile.
constexpr int64_t kStepsUntilAhead = 24;

template <typename T, int kRows, int kVectors, RowsOfA kA, Result kResult>
CK_INLINE void product_tile(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                            RowsAhead& ahead) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) {
      sum[m][n] = kResult == Result::accumulated ? load(c + m * c_stride + n * L) : Vec<T>{};
    }
  }
  const auto multiply = [&](int64_t steps) __attribute__((always_inline)) {
#pragma GCC unroll kStepsPerRound
    for (int64_t k = 0; k < steps; ++k) {
      Vec<T> row[kVectors];
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * L);
      b += b_stride;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Vec<T> x = broadcast_element<T>(kA == RowsOfA::strided ? a[m * a_stride] : a[m]);
#pragma GCC unroll 8
        for (int n = 0; n < kVectors; ++n) sum[m][n] = multiply_add(x, row[n], sum[m][n]);
      }
      a += kA == RowsOfA::strided ? 1 : a_stride;
    }
  };
  const int64_t until_ahead = !tiles_ask() || depth < 2 * kStepsUntilAhead ? depth : kStepsUntilAhead;
  multiply(until_ahead);
  if (tiles_ask()) {
    ahead.step();
    multiply(depth - until_ahead);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) store(c + m * c_stride + n * L, sum[m][n]);
  }
}

// `rows` rows of one panel of C in `tiles` tiles of equal height, give or take one row: a low tile would wait for its own
// latency.
template <typename T, int kRows, int kVectors, RowsOfA kA, Result kResult>
void product_tiles(int64_t rows, int64_t tiles, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                   int64_t c_stride, RowsAhead& ahead) {
  for (; rows > tiles * (kRows - 1); rows -= kRows, --tiles) {
    product_tile<T, kRows, kVectors, kA, kResult>(depth, a, a_stride, b, b_stride, c, c_stride, ahead);
    a += kRows * (kA == RowsOfA::strided ? a_stride : 1);
    c += kRows * c_stride;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) {
      product_tiles<T, kRows - 1, kVectors, kA, kResult>(rows, tiles, depth, a, a_stride, b, b_stride, c, c_stride, ahead);
    }
  }
}

// One panel of C, all its rows.
template <typename T, int kVectors, RowsOfA kA, Result kResult>
void product_rows(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                  RowsAhead& ahead) {
  constexpr int kRows = tile_rows(kVectors);
  product_tiles<T, kRows, kVectors, kA, kResult>(rows, (rows + kRows - 1) / kRows, depth, a, a_stride, b, b_stride, c, c_stride,
                                                 ahead);
}

// Width of the next panel where so many vectors of columns are left: twos, and for an odd number a three (or a single one) at the
// end. Where panels are wide: all that is left if less than six, three if that divides it, else four.
constexpr int64_t panel_vectors(int64_t vectors_left) {
  if (kTiles) return 1;
  if (kWidePanels) return vectors_left < 6 ? vectors_left : vectors_left % 3 == 0 ? 3 : 4;
  return vectors_left == 3 || vectors_left == 1 ? vectors_left : 2;
}

template <typename T, RowsOfA kA, RowsOfB kB, Result kResult>
void product_panels(int64_t rows, int64_t vectors, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                    int64_t c_stride, RowsAhead& ahead) {
  while (vectors > 0) {
    const int64_t width = panel_vectors(vectors);
    const int64_t stride = kB == RowsOfB::in_panels ? width * kLanes<T> : b_stride;
    auto* rows_of_panel = width == 1   ? product_rows<T, 1, kA, kResult>
                          : width == 2 ? product_rows<T, 2, kA, kResult>
                                       : product_rows<T, 3, kA, kResult>;
    if constexpr (kWidePanels) {
      if (width == 4) rows_of_panel = product_rows<T, 4, kA, kResult>;
      if (width == 5) rows_of_panel = product_rows<T, 5, kA, kResult>;
    }
    rows_of_panel(rows, depth, a, a_stride, b, stride, c, c_stride, ahead);
    b += width * kLanes<T> * (kB == RowsOfB::in_panels ? depth : 1);
    c += width * kLanes<T>;
    vectors -= width;
  }
}

// The depth of a product, in elements: whole steps, and where there are terms (terms.h) the tail of a sum over channels. There
// what is left of the channels lies side by side, all terms that are multiplied: 4 pairs of 72 channels, in 2 steps instead of 6.
struct Depth {
  int64_t whole, tail = 0;
  Depth(int64_t elements) : whole(elements) {}
  Depth(int64_t whole, int64_t tail) : whole(whole), tail(tail) {}

  int64_t elements() const { return kTerms * whole + tail; }  // of a column of a panel, all terms
  // Where the tail of a row is: behind the last term, which is complete there, as are the others.
  int64_t tail_of_row(int64_t stride) const { return (kTerms - 1) * (stride / kTerms) + whole + (tail > 0 ? kDepthStep : 0); }
};

// C [rows, vectors * kLanes] (+)= A [rows, depth] B [depth, vectors * kLanes]. b_stride is for RowsOfB::in_rows alone. `ahead`
// makes a step with every tile, where tiles ask. Terms (terms.h) of a row of A or B are a kTerms-th of its stride apart, those of a
// panel follow one another.
template <typename T, RowsOfA kA, RowsOfB kB>
void product(Result result, int64_t rows, int64_t vectors, Depth depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
             T* c, int64_t c_stride, [[maybe_unused]] RowsAhead& ahead) {
#ifdef COMP_KERNELS_TILES
  static_assert(kA == RowsOfA::strided, "tiles of A are rows");
  TileOperands operands{a, a_stride, b, b_stride, b_stride / kTerms, kTile};
  if (kB == RowsOfB::in_panels) {
    operands = {a, a_stride, b, kTile, kTile * depth.whole, kTile * depth.elements()};
    operands.tail = depth.tail, operands.a_tail = depth.tail_of_row(a_stride), operands.b_tail = kTile * kTerms * depth.whole;
  }
  const auto multiply = result == Result::overwritten ? product_on_tiles<false> : product_on_tiles<true>;
  multiply(rows, vectors * kTile, depth.whole, operands, c, c_stride);
#else
  if (result == Result::overwritten) {
    product_panels<T, kA, kB, Result::overwritten>(rows, vectors, depth.whole, a, a_stride, b, b_stride, c, c_stride, ahead);
  } else {
    product_panels<T, kA, kB, Result::accumulated>(rows, vectors, depth.whole, a, a_stride, b, b_stride, c, c_stride, ahead);
  }
#endif
}

// Elements of the depth of a product that sums `count` numbers: whole pairs, whole steps. Operands are zero from `count` on.
constexpr int64_t operand_depth(int64_t count) {
  const int64_t elements = (count + kPack - 1) / kPack;
  return (elements + kDepthStep - 1) / kDepthStep * kDepthStep;
}

// The depth of a product that sums over channels.
inline Depth channel_depth(int64_t head_dim) {
  if (kTerms == 1) return operand_depth(head_dim);
  const int64_t whole = head_dim / (kPack * kDepthStep) * kDepthStep, left = head_dim / kPack - whole;
  const int64_t tail = (kProducts * left + kDepthStep - 1) / kDepthStep * kDepthStep;
  return whole > 0 && tail < kProducts * kDepthStep ? Depth(whole, tail) : Depth(operand_depth(head_dim));
}

// Rows that are turned into operands together: whole vectors of rows, and whole steps of a depth that they are summed over.
template <typename T>
constexpr int64_t kRowsTogether = kLanes<T> > kPack* kDepthStep ? kLanes<T> : kPack* kDepthStep;

// About how many tiles a product has.
template <typename T>
int64_t count_tiles(int64_t rows, int64_t columns) {
  constexpr int64_t kTileColumns = 2 * kLanes<T>;
  return (rows / kTileRows + 1) * ((columns + kTileColumns - 1) / kTileColumns);
}

// Rows of `columns` elements are kept this far apart: whole cache lines, an odd number of them, so that a column of a matrix
// spreads over all sets of the cache.
template <typename T>
constexpr int64_t row_stride(int64_t columns) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  return ((columns + kLine - 1) / kLine | 1) * kLine;
}

template <typename T>
constexpr int64_t round_up_to_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// --- transposition into panels -----------------------------------------------------------------------------------------

// Exchange blocks of kBlock lanes between two rows: [a0 a1 a2 a3] [b0 b1 b2 b3] -> [a0 b0 a2 b2] [a1 b1 a3 b3].
template <typename T, int kBlock, int... kLane>
CK_INLINE void exchange_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int L = kLanes<T>;
  const Vec<T> first = SHUFFLE(T, a, b, (kLane & kBlock ? L + kLane - kBlock : kLane)...);
  b = SHUFFLE(T, a, b, (kLane & kBlock ? L + kLane : kLane + kBlock)...);
  a = first;
}

template <typename T, int kBlock = kLanes<T> / 2>
CK_INLINE void transpose_square(Vec<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & kBlock) == 0) {
      exchange_blocks<T, kBlock>(rows[i], rows[i + kBlock], std::make_integer_sequence<int, kLanes<T>>{});
    }
  }
  if constexpr (kBlock > 1) transpose_square<T, kBlock / 2>(rows);
}

// combine() over the lanes of each of kLanes rows, row i's in lane i: a transposition that combines on the way. Destroys `rows`.
template <typename T, int kBlock = kLanes<T> / 2, typename Combine>
CK_INLINE Vec<T> across_lanes(Vec<T> (&rows)[kLanes<T>], Combine combine) {
#pragma GCC unroll 16
  for (int i = 0; i < kBlock; ++i) {
    exchange_blocks<T, kBlock>(rows[i], rows[i + kBlock], std::make_integer_sequence<int, kLanes<T>>{});
    rows[i] = combine(rows[i], rows[i + kBlock]);
  }
  if constexpr (kBlock > 1) across_lanes<T, kBlock / 2>(rows, combine);
  return rows[0];
}

// Dot products of kLanes rows of a and b, [kLanes, depth] (readable up to depth rounded up to whole vectors), operands both, each
// summed from first to last as product_tile does.
template <typename T>
Vec<T> row_dots(const T* a, const T* b, int64_t stride, int64_t depth) {
  constexpr int L = kLanes<T>;
  Vec<T> sum{};
  for (int64_t k = 0; k < depth; k += L) {
    Vec<T> x[L], y[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) x[i] = load(a + i * stride + k), y[i] = load(b + i * stride + k);
    transpose_square<T>(x);
    transpose_square<T>(y);
    if (k + L <= depth) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) sum = multiply_add(x[i], y[i], sum);
    } else {
      for (int i = 0; i < depth - k; ++i) sum = multiply_add(x[i], y[i], sum);
    }
  }
  return sum;
}

// x [kLanes, columns] -> y [columns, kLanes], `columns` whole vectors.
template <typename T>
void transpose(const T* x, int64_t x_stride, int64_t columns, T* y, int64_t y_stride) {
  constexpr int L = kLanes<T>;
  for (int64_t j = 0; j < columns; j += L) {
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = load(x + i * x_stride + j);
    transpose_square<T>(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(y + (j + i) * y_stride, square[i]);
  }
}

// Distance of the rows of an operand with `columns` elements, terms and all.
template <typename T>
constexpr int64_t operand_stride(int64_t columns) {
  return kTerms * row_stride<T>(columns);
}

// The same for rows of channels, which may have a tail.
template <typename T>
int64_t channel_stride(int64_t head_dim) {
  const int64_t tail = channel_depth(head_dim).tail;
  return operand_stride<T>(tail == 0 ? head_dim : std::max(head_dim, operand_depth(head_dim) + tail + kDepthStep));
}

// rows [kLanes, depth], an operand (readable up to depth rounded up to whole vectors) -> columns first_column .. + kLanes of the
// packed panels [depth, columns].
template <typename T>
void transpose_into_panels(const T* rows, int64_t stride, Depth depth, T* panels, int64_t columns, int64_t first_column) {
  constexpr int L = kLanes<T>;
  int64_t start = 0, width = 0;  // of the panel that holds first_column
  for (; start <= first_column; start += width) width = panel_vectors((columns - start) / L) * L;
  start -= width;
  T* to = panels + start * depth.elements() + (first_column - start);
  const auto transpose_part = [&](const T* part, int64_t elements) {
    for (int64_t k = 0; k < elements; k += L) {
      Vec<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load(part + i * stride + k);
      transpose_square<T>(square);
      if (k + L <= elements) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(to + (k + i) * width, square[i]);
      } else {
        for (int i = 0; i < elements - k; ++i) store(to + (k + i) * width, square[i]);
      }
    }
    to += elements * width;
  };
  for (int t = 0; t < kTerms; ++t) transpose_part(rows + t * (stride / kTerms), depth.whole);
  if (kTerms > 1) transpose_part(rows + depth.tail_of_row(stride), depth.tail);
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
