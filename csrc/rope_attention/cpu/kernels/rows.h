// Rows of q, k, v between the user's tensors and the kernels' scratch: widened, rotated, and back again. Sets that multiply 16-bit
// numbers keep rows as such: widened for the rotation only, copied where there is none.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cpu/half.h"
#include "common/cpu/simd.h"
#include "../rope_attention.h"
#include "matmul.h"

namespace comp_kernels::COMP_KERNELS_ISA {

using Params = comp_kernels_rope_attention_params;

// Type of the arithmetic for a storage type.
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

constexpr double kLog2e = 1.44269504088896340736;

// scale / ln 2, which turns scores into bits: one rounding, so that the backward pass finds the exponents of the forward pass.
template <typename T>
T scale_in_bits(const Params& p) {
  return static_cast<T>(p.scale * kLog2e);
}

// Length of the blocks that `count` rows are cut into: equal parts of about `about` rows, multiples of `multiple` (the last is
// what is left), for a short last block would cost a pass of its own. At most longest_block(about, multiple).
inline int64_t block_length(int64_t count, int64_t about, int64_t multiple) {
  const int64_t blocks = count > about ? (count + about / 2) / about : 1;
  return ((count + blocks - 1) / blocks + multiple - 1) / multiple * multiple;
}
constexpr int64_t longest_block(int64_t about, int64_t multiple) { return (about * 3 / 2 + multiple - 1) / multiple * multiple; }

template <typename S>
CK_INLINE void widen_row(const S* x, Compute<S>* y, int64_t n) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(y + i, load_widened(x + i));
  for (; i < n; ++i) y[i] = widen(x[i]);
}

// y = factor * x
template <typename S>
CK_INLINE void narrow_row(const Compute<S>* x, Compute<S> factor, S* y, int64_t n) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_narrowed(load(x + i) * factor, y + i);
  for (; i < n; ++i) narrow(x[i] * factor, y[i]);
}

// One side's rotary tables (queries' or keys'), and the gradients of their entries.
template <typename T>
struct Tables {
  const T *cos, *sin;  // [tokens, heads, width]; null: no rotation
  T *dcos, *dsin;      // [tokens, heads of q or k, width]; null: not wanted
  int64_t heads;       // 1 when all heads share the table
  int64_t width;       // rotary_dim, or half of it
  bool one_per_pair;   // half of it: both channels of a pair read the same entry

  bool rotate() const { return cos != nullptr; }
  int64_t row(int64_t token, int64_t head) const { return (token * heads + (heads > 1 ? head : 0)) * width; }
};

template <typename T>
Tables<T> query_tables(const Params& p) {
  return {static_cast<const T*>(p.cos),
          static_cast<const T*>(p.sin),
          static_cast<T*>(p.dcos),
          static_cast<T*>(p.dsin),
          p.table_heads,
          p.table_width,
          p.table_width != p.rotary_dim};
}

template <typename T>
Tables<T> key_tables(const Params& p) {
  return {static_cast<const T*>(p.cos_k),
          static_cast<const T*>(p.sin_k),
          static_cast<T*>(p.dcos_k),
          static_cast<T*>(p.dsin_k),
          p.table_heads_k,
          p.table_width,
          p.table_width != p.rotary_dim};
}

// Entries of a table row that belong to the first and the second channel of pair (block, j), block = 2p * (number of the block).
struct PairIndex {
  int64_t first, second;
  CK_INLINE PairIndex(bool one_per_pair, int64_t pair_stride, int64_t block, int64_t j)
      : first(one_per_pair ? block / 2 + j : block + j), second(one_per_pair ? first : first + pair_stride) {}
};

enum class Rotation { forward, transposed };

// y = x * cos + swap(x) * sin over the first rotary_dim channels, or the transpose of that, which turns the gradient of the
// rotated row into that of the row. Tables are read from entry `row` on; x and y are different memory. x is read as it is stored:
// on its way through a buffer, vectors of it would be loaded across those just stored, and wait for them.
template <Rotation kRotation, typename S, typename Y, typename T>
CK_INLINE void rotate_row(const S* x, Y* y, const Tables<T>& tables, int64_t row, const Params& p) {
  constexpr int L = kLanes<T>;
  constexpr bool kForward = kRotation == Rotation::forward;
  const int64_t stride = p.pair_stride;
  const bool one_per_pair = tables.one_per_pair;
  const T *cos = tables.cos + row, *sin = tables.sin + row;
  if (stride >= L) {
    for (int64_t block = 0; block < p.rotary_dim; block += 2 * stride) {
      for (int64_t j = 0; j < stride; j += L) {
        if (j + L > stride) j = stride - L;  // the last vector overlaps its neighbour
        const PairIndex t(one_per_pair, stride, block, j);
        const int64_t a = block + j, b = a + stride;
        const Vec<T> first = load_widened(x + a), second = load_widened(x + b), sin_a = load(sin + t.first),
                     sin_b = load(sin + t.second);
        store_narrowed(kForward ? first * load(cos + t.first) - second * sin_a : first * load(cos + t.first) + second * sin_b,
                       y + a);
        store_narrowed(kForward ? second * load(cos + t.second) + first * sin_b : second * load(cos + t.second) - first * sin_a,
                       y + b);
      }
    }
    return;
  }
  int64_t done = 0;
  if (stride == 1 && !one_per_pair) {  // neighbours in one vector
    Vec<T> sign;
    for (int i = 0; i < L; ++i) sign[i] = (i % 2 == 0) == kForward ? T(-1) : T(1);
    for (; done + L <= p.rotary_dim; done += L) {
      const Vec<T> v = load_widened(x + done), c = load(cos + done), s = load(sin + done);
      store_narrowed(v * c + (kForward ? swap_neighbours<T>(v) * sign * s : swap_neighbours<T>(v * s) * sign), y + done);
    }
  }
  for (int64_t block = done; block < p.rotary_dim; block += 2 * stride) {
    for (int64_t j = 0; j < stride; ++j) {
      const PairIndex t(one_per_pair, stride, block, j);
      const int64_t a = block + j, b = a + stride;
      const T first = widen(x[a]), second = widen(x[b]);
      narrow(kForward ? first * cos[t.first] - second * sin[t.first] : first * cos[t.first] + second * sin[t.second], y[a]);
      narrow(kForward ? second * cos[t.second] + first * sin[t.second] : second * cos[t.second] - first * sin[t.first], y[b]);
    }
  }
}

// Gradients of one table row: scale * g is the gradient of the rotated row, x the row before rotation.
template <typename T>
void table_row_gradients(const T* g, T scale, const T* x, const Tables<T>& tables, T* dcos, T* dsin, const Params& p) {
  const int64_t stride = p.pair_stride;
  const bool one_per_pair = tables.one_per_pair;
  for (int64_t block = 0; block < p.rotary_dim; block += 2 * stride) {
    for (int64_t j = 0; j < stride; ++j) {
      const PairIndex t(one_per_pair, stride, block, j);
      const int64_t a = block + j, b = a + stride;
      const T first = g[a] * scale, second = g[b] * scale;
      if (one_per_pair) {
        dcos[t.first] = first * x[a] + second * x[b];
        dsin[t.first] = second * x[a] - first * x[b];
      } else {
        dcos[t.first] = first * x[a];
        dcos[t.second] = second * x[b];
        dsin[t.first] = -first * x[b];
        dsin[t.second] = second * x[a];
      }
    }
  }
}

// Which operand of a product that sums over channels a row belongs to.
enum class Operand { left, right };

#ifdef COMP_KERNELS_TERMS
// x [head_dim] -> a row of an operand: its terms a kTerms-th of `stride` apart, with zeros up to operand_depth(head_dim), and the
// tail (Depth, matmul.h).
template <Operand kOperand, typename S>
CK_INLINE void split_row(const S* x, int64_t head_dim, float* y, int64_t stride) {
  constexpr int64_t L = kLanes<float>;
  const Depth depth = channel_depth(head_dim);
  for (int64_t d = 0; d < head_dim; d += 2 * L) {
    const int64_t pairs = min(L, (head_dim - d) / 2);
    Vec<float> terms[kTerms];
    split_pairs(load_first(x + d, pairs), load_first(x + d + pairs, pairs), terms);
    for (int t = 0; t < kTerms; ++t) store(y + t * (stride / kTerms) + d / 2, terms[t]);
    if (pairs == L || depth.tail == 0) continue;
    float* tail = y + depth.tail_of_row(stride);
    for (int64_t k = 0; k < depth.tail; k += L) store(tail + k, Vec<float>{});
#pragma GCC unroll 8
    for (int n = 0; n < kProducts; ++n) {
      store(tail + n * pairs, terms[kOperand == Operand::left ? kMultiplied[n].a : kMultiplied[n].b]);
    }
  }
}
#endif

// Reads one row of q, k or v, rotated when there are tables, as a row of an operand with zeros behind it: pairs up to
// operand_depth(head_dim), those of terms as split_row has them, or widened, up to whole vectors.
template <typename S, Operand kOperand, typename T>
CK_INLINE void load_row(const S* x, T* y, [[maybe_unused]] int64_t stride, const Tables<T>& tables, int64_t row, const Params& p) {
  const int64_t D = p.head_dim, rotated = tables.rotate() ? p.rotary_dim : 0;
#if defined(COMP_KERNELS_TERMS)
  if (rotated == 0) return split_row<kOperand>(x, D, y, stride);
  float turned[kMaxHeadDim];
  rotate_row<Rotation::forward>(x, turned, tables, row, p);
  widen_row(x + rotated, turned + rotated, D - rotated);
  split_row<kOperand>(turned, D, y, stride);
#elif defined(COMP_KERNELS_PAIRS)
  COMP_KERNELS_PAIRS* numbers = reinterpret_cast<COMP_KERNELS_PAIRS*>(y);
  if (rotated > 0) rotate_row<Rotation::forward>(x, numbers, tables, row, p);
  copy_row(x + rotated, D - rotated, numbers + rotated, kPack * operand_depth(D) - rotated);
#else
  if (rotated > 0) rotate_row<Rotation::forward>(x, y, tables, row, p);
  widen_row(x + rotated, y + rotated, D - rotated);
  for (int64_t d = D; d < round_up_to_lanes<T>(D); ++d) y[d] = 0;
#endif
}

// Adds rows token .. token + rows of one head of x [*, heads, D] with the given strides.
template <typename S>
void add_rows(RowsAhead& ahead, const void* x, int64_t token_stride, int64_t head_stride, int64_t token, int64_t rows,
              int64_t head) {
  ahead.add(static_cast<const S*>(x) + token * token_stride + head * head_stride, token_stride * static_cast<int64_t>(sizeof(S)),
            rows);
}

// The same for a contiguous tensor.
template <typename S>
void add_rows(RowsAhead& ahead, const void* x, int64_t heads, int64_t token, int64_t rows, int64_t head, const Params& p) {
  add_rows<S>(ahead, x, heads * p.head_dim, p.head_dim, token, rows, head);
}

// Rows token .. token + rows of one head, from x [*, heads, D] with the given strides, to y with rows `stride` apart. They follow
// `done` rows of the `count` that the caller reads in all.
template <typename S, Operand kOperand, typename T>
void load_rows(const void* x, int64_t token_stride, int64_t head_stride, int64_t token, int64_t rows, int64_t done, int64_t count,
               int64_t head, const Tables<T>& tables, T* y, int64_t stride, const Params& p) {
  const S* from = static_cast<const S*>(x) + token * token_stride + head * head_stride;
  for (int64_t i = 0; i < rows; ++i, from += token_stride, y += stride) {
    keep_tiles_awake(i);
    ask_ahead(from, token_stride, done + i, count, p.head_dim);
    load_row<S, kOperand>(from, y, stride, tables, tables.row(token + i, head), p);
  }
}

// Calls pair(i, i + apart) for the pairs of `rows` rows; the second may be beyond them.
template <typename Pair>
CK_INLINE void for_pairs(int64_t rows, int64_t apart, Pair pair) {
  for (int64_t group = 0; group < rows; group += 2 * apart) {
    for (int64_t i = group; i < min(group + apart, rows); ++i) pair(i, i + apart);
  }
}
inline int64_t count_pairs(int64_t rows, int64_t apart) { return rows / (2 * apart) * apart + min(rows % (2 * apart), apart); }

// Rows of v, not rotated, as a right operand whose depth is the rows, kApart of them paired: [operand_depth(rows), D].
template <typename S, typename T>
void load_right_rows(const void* x, int64_t token_stride, int64_t head_stride, int64_t token, int64_t rows, int64_t done,
                     int64_t count, int64_t head, T* y, int64_t stride, const Params& p) {
  if constexpr (kPack == 1) {
    load_rows<S, Operand::right>(x, token_stride, head_stride, token, rows, done, count, head, Tables<T>{}, y, stride, p);
  } else {
    const int64_t D = p.head_dim;
    const S* from = static_cast<const S*>(x) + token * token_stride + head * head_stride;
    for_pairs(rows, kApart, [&](int64_t i, int64_t other) {
      keep_tiles_awake(i);
      const S *even = from + i * token_stride, *odd = from + other * token_stride;
      ask_ahead(even, token_stride, done + i, count, D, 2 * kApart);
      if (other < rows) ask_ahead(odd, token_stride, done + other, count, D, 2 * kApart);
#ifdef COMP_KERNELS_TERMS
      for (int64_t d = 0; d < D; d += kLanes<T>) {
        store_pairs(y + d, stride / kTerms, load_first(even + d, D - d), other < rows ? load_first(odd + d, D - d) : Vec<T>{});
      }
#else
      pair_rows(even, other < rows ? odd : nullptr, D, y, round_up_to_lanes<T>(D));
#endif
      y += stride;
    });
    std::fill_n(y, (operand_depth(rows) - count_pairs(rows, kApart)) * stride, T(0));
  }
}

// Rows of a left operand -> pairs of rows `apart`, a right operand whose depth is the rows, [operand_depth(rows), D]. Without
// pairs the rows are it, and `to` is not written.
template <typename T>
void as_right_operand(const T* x, int64_t rows, int64_t apart, int64_t head_dim, int64_t stride, T* to) {
  if constexpr (kPack > 1) {
    for_pairs(rows, apart, [&](int64_t i, int64_t other) {
      for (int t = 0; t < kTerms; ++t) {
        const int64_t term = t * (stride / kTerms);
        const T *even = x + i * stride + term, *odd = x + other * stride + term;
        pair_rows(even, other < rows ? odd : nullptr, head_dim, to + term, round_up_to_lanes<T>(head_dim));
      }
      to += stride;
    });
    std::fill_n(to, (operand_depth(rows) - count_pairs(rows, apart)) * stride, T(0));
  }
}

// Neighbouring vectors of a row of results -> what a later product reads as its left operand, whose rows are `stride` apart.
template <typename T, int N>
CK_INLINE void store_operands(T* to, [[maybe_unused]] int64_t stride, const Vec<T> (&x)[N]) {
#if defined(COMP_KERNELS_TERMS)
  store_pairs(to, stride / kTerms, x[0], x[1]);
#elif defined(COMP_KERNELS_PAIRS)
  static_assert(N == kPack, "two vectors of float are one of pairs");
  store(to, pair_columns(x[0], x[1]));
#else
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store(to + n * kLanes<T>, x[n]);
#endif
}

// Writes the gradient of q or k for rows token .. token + rows of one head: g is that of the rotated rows, divided by
// `scale`; x as in load_rows; dx is contiguous [*, heads, D].
template <typename S, typename T>
void store_rotated_gradients(const T* g, int64_t stride, T scale, const void* x, int64_t token_stride, int64_t head_stride,
                             int64_t token, int64_t rows, int64_t head, int64_t heads, const Tables<T>& tables, void* dx,
                             const Params& p) {
  const int64_t D = p.head_dim;
  const S* from = static_cast<const S*>(x) + token * token_stride + head * head_stride;
  T turned[kMaxHeadDim];
  for (int64_t i = 0; i < rows; ++i, from += token_stride, g += stride) {
    const int64_t row = (token + i) * heads + head;
    S* to = static_cast<S*>(dx) + row * D;
    keep_tiles_awake(i);
    ask_ahead<Rows::written>(to, heads * D, i, rows, D);
    const T* gradient = g;
    if (tables.rotate()) {
      if (tables.dcos != nullptr) {
        T widened[kMaxHeadDim];
        widen_row(from, widened, D);
        table_row_gradients(g, scale, widened, tables, tables.dcos + row * tables.width, tables.dsin + row * tables.width, p);
      }
      rotate_row<Rotation::transposed>(g, turned, tables, tables.row(token + i, head), p);
      for (int64_t d = p.rotary_dim; d < D; ++d) turned[d] = g[d];
      gradient = turned;
    }
    narrow_row(gradient, scale, to, D);
  }
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
