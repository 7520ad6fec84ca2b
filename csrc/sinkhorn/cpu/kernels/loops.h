// The loops of sinkhorn, over a block of columns [rows, cols], cols a multiple of kLanes, and over whole rows. Members would be
// read again after every vector store, which may alias anything: so these are free functions, and everything they read is an
// argument.
#pragma once

#include "common/cpu/score_tile.h"

namespace comp_kernels::COMP_KERNELS_ISA {

constexpr int kRowsAtOnce = 4;  // rows that share one load and store of the column sums
constexpr int kExponentialRows = 2;  // the same for whole rows of scores: more, and as many ahead, crowd the first level cache
// Row sums are added up in double from sums of so many terms, 32 in every lane: longer ones lose digits.
template <typename T>
constexpr int64_t kSumCols = 32 * kLanes<T>;
// Scores are asked for ahead: the next rows where those stay in the caches until their turn, else so many columns.
constexpr int64_t kShortRowBytes = 32 * 1024, kColsAhead = 512;

// Exponents without a shift are cut to this: 2^x of a larger one would wrap around to any number at all, where a sum that is too
// large tells serves_without_shift. NaN stays.
template <typename T>
CK_INLINE Vec<T> within_range(Vec<T> x) {
  return min<T>(broadcast(sizeof(T) == 4 ? T(127) : T(1023)), x);
}

template <typename F, int... kRow>
CK_INLINE void each_row(F&& f, std::integer_sequence<int, kRow...>) {
  (f(kRow), ...);
}
// f(0), f(1), .. f(count - 1), unrolled.
template <typename F, int kCount>
CK_INLINE void each_row(std::integral_constant<int, kCount>, F&& f) {
  each_row(f, std::make_integer_sequence<int, kCount>{});
}

// A function of a number of rows known at compile time, over all rows: f(first, constant<kRows>), then one by one.
template <int kRows = kRowsAtOnce, typename F>
CK_INLINE void for_row_groups(int64_t rows, F&& f) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) f(i, std::integral_constant<int, kRows>{});
  for (; i < rows; ++i) f(i, std::integral_constant<int, 1>{});
}

template <typename T, int kCount>
CK_INLINE Vec<T> sum_of(const Vec<T> (&x)[kCount]) {
  if constexpr (kCount == 4) return (x[0] + x[1]) + (x[2] + x[3]);
  if constexpr (kCount == 2) return x[0] + x[1];
  return x[0];
}

// shift_k = - max_i (s_ik scale_k + u_i), 0 for a column without any mass.
template <typename S, typename T = Compute<S>>
void column_peaks(const S* scores, int64_t stride, int64_t rows, int64_t cols, const T* __restrict scale, const T* u,
                  T* __restrict shift) {
  std::fill_n(shift, cols, kMinusInfinity<T>);
  for_row_groups(rows, [&](int64_t first, auto count) {
    for (int64_t k = 0; k < cols; k += kLanes<T>) {
      const Vec<T> c = load(scale + k);
      Vec<T> top = load(shift + k);
      each_row(count, [&](int r) { top = max<T>(top, load_widened(scores + (first + r) * stride + k) * c + u[first + r]); });
      store(shift + k, top);
    }
  });
  for (int64_t k = 0; k < cols; ++k) shift[k] = std::isfinite(shift[k]) ? -shift[k] : T(0);
}

// E_ik = 2^(s_ik scale_k + u_i + shift_k), [rows, width], and its column sums. scores may be e itself.
template <typename S, typename T = Compute<S>>
void column_exponentials(const S* scores, int64_t stride, int64_t rows, int64_t cols, const T* scale, const T* shift, const T* u,
                         T* e, int64_t width, T* sum) {
  std::fill_n(sum, cols, T(0));
  for_row_groups(rows, [&](int64_t first, auto count) {
    const S* s = scores + first * stride;
    T* out = e + first * width;
    for (int64_t k = 0; k < cols; k += kLanes<T>) {
      const Vec<T> c = load(scale + k), d = load(shift + k);
      Vec<T> x[count];
      each_row(count, [&](int r) {
        __builtin_prefetch(s + r * stride + k + cols);  // the same rows of the next block: each row is a stream of its own
        x[r] = within_range<T>(load_widened(s + r * stride + k) * c + (d + u[first + r]));
      });
      exp2(x);
      each_row(count, [&](int r) { store(out + r * width + k, x[r]); });
      store(sum + k, load(sum + k) + sum_of<T>(x));
    }
  });
}

// Past the caches; p is aligned to vectors. Other threads see it after the next locked instruction, which the hand-out of work
// is. A row at a time: lines that are not completed in one go cost three times as much.
template <typename T>
CK_INLINE void store_streaming(T* p, Vec<T> x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#else
  store(p, x);
#endif
}

template <typename T>
bool streamable(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

// sum_k e_k w_k over one row.
template <typename T>
CK_INLINE T weighted_row_sum(const T* e, const T* w, int64_t cols) {
  Vec<T> x{}, y{}, z{}, t{};
  int64_t k = 0;
  for (; k + 4 * kLanes<T> <= cols; k += 4 * kLanes<T>) {
    x += load(e + k) * load(w + k);
    y += load(e + k + kLanes<T>) * load(w + k + kLanes<T>);
    z += load(e + k + 2 * kLanes<T>) * load(w + k + 2 * kLanes<T>);
    t += load(e + k + 3 * kLanes<T>) * load(w + k + 3 * kLanes<T>);
  }
  for (; k < cols; k += kLanes<T>) x += load(e + k) * load(w + k);
  return reduce_sum<T>((x + y) + (z + t));
}

// --- whole rows, of any number of columns -----------------------------------------------------------------------------------

// One vector or, for the columns beyond the last whole vector, one number: f(k, constant<lanes>).
template <typename T, typename F>
CK_INLINE void for_columns(int64_t cols, F&& f) {
  int64_t k = 0;
  for (; k + kLanes<T> <= cols; k += kLanes<T>) f(k, std::integral_constant<int, kLanes<T>>{});
  for (; k < cols; ++k) f(k, std::integral_constant<int, 1>{});
}
template <typename T, int kCount>
CK_INLINE Vec<T> load(const T* p, std::integral_constant<int, kCount>) {
  if constexpr (kCount == 1) return Vec<T>{*p};  // the other lanes are zero
  return load(p);
}
template <typename T, int kCount>
CK_INLINE void store(T* p, Vec<T> x, std::integral_constant<int, kCount>) {
  if constexpr (kCount == 1) {
    *p = x[0];
  } else {
    store(p, x);
  }
}

template <typename T, int kCount>
CK_INLINE void store_streaming(T* p, Vec<T> x, std::integral_constant<int, kCount> lanes) {
  if constexpr (kCount == 1) {
    store(p, x, lanes);
  } else {
    store_streaming<T>(p, x);
  }
}

template <typename S, int kCount, typename T = Compute<S>>
CK_INLINE Vec<T> load_widened(const S* p, std::integral_constant<int, kCount>) {
  if constexpr (kCount == 1) return Vec<T>{widen(*p)};
  return load_widened(p);
}

// e_ik = 2^(s_ik factor + u_i + shift_k), sum_k = sum_i e_ik; kShifted: shift is not null
template <bool kShifted, typename S, typename T = Compute<S>>
void exponential_rows(const S* scores, int64_t stride, int64_t rows, int64_t cols, T factor, const T* u, const T* shift, T* e,
                      T* sum) {
  std::fill_n(sum, cols, T(0));
  const bool rows_ahead = cols * static_cast<int64_t>(sizeof(S)) <= kShortRowBytes;
  for_row_groups<kExponentialRows>(rows, [&](int64_t first, auto count) {
    constexpr int kCount = count;
    const int64_t ahead = rows_ahead ? kCount * stride : kColsAhead;
    const S* s = scores + first * stride;
    T* out = e + first * cols;
    const Vec<T> scale = broadcast(factor);
    for_columns<T>(cols, [&](int64_t k, auto lanes) {
      Vec<T> x[kCount];
      each_row(count, [&](int r) {
        __builtin_prefetch(s + r * stride + k + ahead);
        const Vec<T> row = lanes == 1 ? Vec<T>{u[first + r]} : broadcast(u[first + r]);  // unused lanes may not overflow
        x[r] = load_widened(s + r * stride + k, lanes) * scale + (kShifted ? load(shift + k, lanes) + row : row);
        if (!kShifted) x[r] = within_range<T>(x[r]);
      });
      exp2(x);
      each_row(count, [&](int r) { store(out + r * cols + k, x[r], lanes); });
      store(sum + k, load(sum + k, lanes) + sum_of<T>(x), lanes);
    });
  });
}

// peak_k = max_i (s_ik factor + u_i)
template <typename S, typename T = Compute<S>>
void peak_rows(const S* scores, int64_t stride, int64_t rows, int64_t cols, T factor, const T* u, T* peak) {
  std::fill_n(peak, cols, kMinusInfinity<T>);
  for_row_groups(rows, [&](int64_t first, auto count) {
    const S* s = scores + first * stride;
    const Vec<T> scale = broadcast(factor);
    for_columns<T>(cols, [&](int64_t k, auto lanes) {
      Vec<T> top = load(peak + k, lanes);
      each_row(count, [&](int r) { top = max<T>(top, load_widened(s + r * stride + k, lanes) * scale + u[first + r]); });
      store(peak + k, top, lanes);
    });
  });
}

// A half step that scales rows and, while they are in the cache, what follows: row_sums_i = sum_k e_ik w_k, x_i = a_i /
// row_sums_i, then sum_k = sum_i x_i e_ik or, where sum is null, plan_ik = e_ik w_k x_i. plan may be e, unless streaming: past
// the caches.
template <typename T>
void scale_rows_and_go_on(const T* e, int64_t rows, int64_t cols, const T* a, const T* w, double* row_sums, T* sum, T* plan,
                          bool streaming) {
  if (sum != nullptr) std::fill_n(sum, cols, T(0));
  for_row_groups(rows, [&](int64_t first, auto count) {
    constexpr int kCount = count;
    const T* group = e + first * cols;
    each_row(count, [&](int r) { row_sums[first + r] = 0; });
    for (int64_t begin = 0; begin < cols; begin += kSumCols<T>) {
      Vec<T> part[kCount];
      each_row(count, [&](int r) { part[r] = Vec<T>{}; });
      for_columns<T>(std::min(kSumCols<T>, cols - begin), [&](int64_t k, auto lanes) {
        const Vec<T> weight = load(w + begin + k, lanes);
        each_row(count, [&](int r) { part[r] += load(group + r * cols + begin + k, lanes) * weight; });
      });
      each_row(count, [&](int r) { row_sums[first + r] += reduce_sum<T>(part[r]); });
    }
    Vec<T> x[kCount];
    each_row(count, [&](int r) { x[r] = broadcast(a[first + r] > 0 ? static_cast<T>(a[first + r] / row_sums[first + r]) : T(0)); });
    T* out = plan + first * cols;
    if (sum != nullptr) {
      for_columns<T>(cols, [&](int64_t k, auto lanes) {
        Vec<T> term[kCount];
        each_row(count, [&](int r) { term[r] = load(group + r * cols + k, lanes) * x[r]; });
        store(sum + k, load(sum + k, lanes) + sum_of<T>(term), lanes);
      });
    } else if (streaming) {
      each_row(count, [&](int r) {
        for_columns<T>(cols, [&](int64_t k, auto lanes) {
          store_streaming(out + r * cols + k, load(group + r * cols + k, lanes) * load(w + k, lanes) * x[r], lanes);
        });
      });
    } else {
      for_columns<T>(cols, [&](int64_t k, auto lanes) {
        const Vec<T> weight = load(w + k, lanes);
        each_row(count, [&](int r) { store(out + r * cols + k, load(group + r * cols + k, lanes) * weight * x[r], lanes); });
      });
    }
  });
}

// Merges the other parts, stride apart, into the first: part_k = merge(part_k, other part_k).
template <typename T, typename F>
void merge_parts(T* parts, int64_t num_parts, int64_t stride, int64_t cols, F&& merge) {
  for_columns<T>(cols, [&](int64_t k, auto lanes) {
    Vec<T> merged = load(parts + k, lanes);
    for (int64_t part = 1; part < num_parts; ++part) merged = merge(merged, load(parts + part * stride + k, lanes));
    store(parts + k, merged, lanes);
  });
}

// potential_k += log2 weight_k
template <typename T>
void add_log2(const T* weight, T* potential, int64_t cols) {
  for_columns<T>(cols, [&](int64_t k, auto lanes) {
    store(potential + k, load(potential + k, lanes) + log2<T>(load(weight + k, lanes)), lanes);
  });
}

// plan_k = e_k w_k x over one row; plan may be e.
template <typename T>
void scale_row(const T* e, const T* w, T x, int64_t cols, T* plan) {
  for_columns<T>(cols, [&](int64_t k, auto lanes) { store(plan + k, load(e + k, lanes) * load(w + k, lanes) * x, lanes); });
}

// sum_k |sum_k w_k - b_k| over the columns with b_k > 0
template <typename T>
double column_error(const T* sums, const T* w, const T* b, int64_t cols) {
  double error = 0;
  for (int64_t k = 0; k < cols; ++k) {
    if (b[k] > 0) error += std::abs(static_cast<double>(sums[k] * w[k] - b[k]));
  }
  return error;
}

// w_k = b_k / sum_k, 0 where b is; returns the largest.
template <typename T>
T column_weights(const T* sums, int64_t cols, const T* b, T* w) {
  Vec<T> largest{};
  for_columns<T>(cols, [&](int64_t k, auto lanes) {
    const Vec<T> sum = load(sums + k, lanes);
    const Vec<T> target = load(b + k, lanes);
    const Vec<T> weight = target == Vec<T>{} ? Vec<T>{} : target / sum;
    store(w + k, weight, lanes);
    largest = max<T>(weight, largest);
  });
  return reduce_max<T>(largest);
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
