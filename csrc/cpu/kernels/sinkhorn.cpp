// Sinkhorn: a full iteration in one read of the scores and one exponential per element.
//
// The scaled plan itself is the numerically stable quantity. With potentials u, v of the iteration before,
//     E_ik = 2^(s_ik + u_i + v_k)       its rows sum to the row marginals, so E never overflows
//     c_k  = sum_i E_ik,  w_k = b_k / c_k,  v_k += log2 w_k                  the columns are brought to b
//     r_i  = sum_k E_ik w_k,  u_i += log2(a_i / r_i)                         then the rows to a
// so the same exponentials serve both half steps. A block of columns is read once, its E kept in cache until its row sums
// are taken. The first iteration has no potentials yet: it subtracts each column's maximum instead. Sums that fall to the
// edge of the floating point range, where E loses terms, are detected and taken again in the log domain.
#include "../sinkhorn.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../parallel.h"
#include "score_tile.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

constexpr int64_t kTileBytes = 256 * 1024;  // E of one block of columns: stays in the second level cache
constexpr int64_t kMaxBlockCols = 1024, kMinBlockCols = 32;
constexpr int64_t kStreamingBytes = 16 << 20;  // results beyond this are written past the caches
constexpr int64_t kMaxChunks = 64;      // pieces of the columns, fixed, so that sums do not depend on the number of threads
constexpr int64_t kPlanCols = 2048, kPlanRows = 64;
// A row sum below this share of the largest weight may have lost terms below the smallest normal number: take it again.
template <typename T>
constexpr T kLost = sizeof(T) == 4 ? T(1e-20) : T(1e-200);

template <typename S>
int64_t block_cols(int64_t num_rows) {
  using T = Compute<S>;
  const int64_t fitting = kTileBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(num_rows, 1);
  return std::clamp(fitting / kLanes<T> * kLanes<T>, kMinBlockCols, kMaxBlockCols);
}

// Scratch of one worker: E of a block, padded to whole vectors, and what belongs to its columns.
template <typename T>
struct Scratch {
  explicit Scratch(int64_t num_rows, int64_t cols) : plan(num_rows * cols) {}
  std::vector<T> plan;  // [n, cols]
  alignas(64) T scale[kMaxBlockCols], shift[kMaxBlockCols], sum[kMaxBlockCols], weight[kMaxBlockCols];
};

// What a pass over some columns adds up.
template <typename T>
struct Totals {
  double* row_sums;      // [n]
  T largest_weight = 0;
  double error = 0;      // sum_k |c_k - b_k| before the columns were scaled; only meaningful after the first iteration
};

// shift_k = - max_i (s_ik scale_k + u_i), 0 for a column without any mass. cols is a multiple of kLanes.
template <typename S, typename T = Compute<S>>
void column_peaks(const S* scores, int64_t stride, int64_t rows, int64_t cols, const T* __restrict scale, const T* u,
                  T* __restrict shift) {
  std::fill_n(shift, cols, kMinusInfinity<T>);
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const S* s0 = scores + i * stride;
    const S *s1 = s0 + stride, *s2 = s1 + stride, *s3 = s2 + stride;
    const Vec<T> u0 = broadcast(u[i]), u1 = broadcast(u[i + 1]), u2 = broadcast(u[i + 2]), u3 = broadcast(u[i + 3]);
    for (int64_t k = 0; k < cols; k += kLanes<T>) {
      const Vec<T> c = load(scale + k);
      const Vec<T> x = max<T>(load_widened(s0 + k) * c + u0, load_widened(s1 + k) * c + u1);
      const Vec<T> y = max<T>(load_widened(s2 + k) * c + u2, load_widened(s3 + k) * c + u3);
      store(shift + k, max<T>(load(shift + k), max<T>(x, y)));
    }
  }
  for (; i < rows; ++i) {
    for (int64_t k = 0; k < cols; k += kLanes<T>) {
      store(shift + k, max<T>(load(shift + k), load_widened(scores + i * stride + k) * load(scale + k) + u[i]));
    }
  }
  for (int64_t k = 0; k < cols; ++k) shift[k] = std::isfinite(shift[k]) ? -shift[k] : T(0);
}

// E_ik = 2^(s_ik scale_k + u_i + shift_k), [rows, width], and its column sums. scores may be e itself.
template <typename S, typename T = Compute<S>>
void column_exponentials(const S* scores, int64_t stride, int64_t rows, int64_t cols, const T* scale, const T* shift, const T* u,
                         T* e, int64_t width, T* sum) {
  std::fill_n(sum, cols, T(0));
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) {
    const S *s0 = scores + i * stride, *s1 = s0 + stride;
    T *e0 = e + i * width, *e1 = e0 + width;
    const Vec<T> u0 = broadcast(u[i]), u1 = broadcast(u[i + 1]);
    for (int64_t k = 0; k < cols; k += kLanes<T>) {
      __builtin_prefetch(s0 + k + cols);  // the same rows of the next block: each row is a stream of its own
      __builtin_prefetch(s1 + k + cols);
      const Vec<T> c = load(scale + k), d = load(shift + k);
      const Vec<T> x = exp2(load_widened(s0 + k) * c + (d + u0)), y = exp2(load_widened(s1 + k) * c + (d + u1));
      store(e0 + k, x);
      store(e1 + k, y);
      store(sum + k, load(sum + k) + (x + y));
    }
  }
  for (; i < rows; ++i) {
    const Vec<T> u0 = broadcast(u[i]);
    for (int64_t k = 0; k < cols; k += kLanes<T>) {
      const Vec<T> x = exp2(load_widened(scores + i * stride + k) * load(scale + k) + (load(shift + k) + u0));
      store(e + i * width + k, x);
      store(sum + k, load(sum + k) + x);
    }
  }
}

template <typename S>
class Block {
 public:
  using T = Compute<S>;
  Block(const Scores<S>& scores, int64_t begin, int64_t cols, int64_t width, Scratch<T>& scratch)
      : scores_(scores), begin_(begin), cols_(cols), width_(width), padded_(round_up(cols, kLanes<T>)), scratch_(scratch) {
    for (int64_t k = 0; k < padded_; ++k) {
      scratch_.scale[k] = scores.factor * (k < cols && scores.col_scale ? scores.col_scale[begin + k] : T(1));
    }
  }

  // One iteration on these columns. v_old null: first iteration.
  void iterate(const T* u, const T* v_old, const T* b, T* v_new, Totals<T>& totals) {
    if (v_old == nullptr) {
      take_peaks(u);
    } else {
      for (int64_t k = 0; k < padded_; ++k) scratch_.shift[k] = k < cols_ ? v_old[begin_ + k] : kMinusInfinity<T>;
    }
    exponentials(u);
    if (v_old != nullptr && lost_columns(b)) {
      take_peaks(u);
      exponentials(u);
    }
    scale_columns(b, v_old, v_new, totals);
    add_row_sums(totals);
  }

  // Per column the largest entry (-inf: no mass) and the sum of 2^(entry - largest).
  void statistics(const T* u, T* peaks, T* sums) {
    take_peaks(u);
    exponentials(u);
    for (int64_t k = 0; k < cols_; ++k) {
      peaks[begin_ + k] = scratch_.sum[k] > 0 ? -scratch_.shift[k] : kMinusInfinity<T>;
      sums[begin_ + k] = scratch_.sum[k];
    }
  }

 private:
  // E of the last, narrower block is padded, so rows are copied there first.
  template <typename F>
  CK_INLINE void with_rows(F&& f) {
    if (padded_ == cols_) {
      f(scores_.data + begin_, scores_.row_stride);
    } else {
      for (int64_t i = 0; i < scores_.num_rows; ++i) {
        for (int64_t k = 0; k < padded_; ++k) {
          scratch_.plan[i * width_ + k] =
              k < cols_ ? widen(scores_.data[i * scores_.row_stride + begin_ + k]) : kMinusInfinity<T>;
        }
      }
      f(static_cast<const T*>(scratch_.plan.data()), width_);
    }
  }

  void take_peaks(const T* u) {
    with_rows([&](auto* scores, int64_t stride) {
      column_peaks(scores, stride, scores_.num_rows, padded_, scratch_.scale, u, scratch_.shift);
    });
  }

  void exponentials(const T* u) {
    with_rows([&](auto* scores, int64_t stride) {
      column_exponentials(scores, stride, scores_.num_rows, padded_, scratch_.scale, scratch_.shift, u, scratch_.plan.data(), width_,
                          scratch_.sum);
    });
  }

  bool lost_columns(const T* b) const {
    for (int64_t k = 0; k < cols_; ++k) {
      if (scratch_.sum[k] < kLost<T> && b[begin_ + k] > 0) return true;
    }
    return false;
  }

  void scale_columns(const T* b, const T* v_old, T* v_new, Totals<T>& totals) {
    for (int64_t k = 0; k < padded_; ++k) {
      const T target = k < cols_ ? b[begin_ + k] : T(0);
      const T weight = target > 0 ? target / scratch_.sum[k] : T(0);
      scratch_.weight[k] = weight;
      totals.largest_weight = std::max(totals.largest_weight, weight);
    }
    if (v_old != nullptr) {
      for (int64_t k = 0; k < cols_; ++k) {
        if (!(b[begin_ + k] > 0)) continue;
        const T old = v_old[begin_ + k], shift = scratch_.shift[k];  // they differ where a sum was taken again below its peak
        const T sum = shift == old ? scratch_.sum[k] : scratch_.sum[k] * std::exp2(old - shift);
        totals.error += std::abs(static_cast<double>(sum - b[begin_ + k]));
      }
    }
    for (int64_t k = 0; k < padded_; k += kLanes<T>) {
      store(scratch_.sum + k, load(scratch_.shift + k) + log2<T>(load(scratch_.weight + k)));
    }
    std::copy_n(scratch_.sum, cols_, v_new + begin_);
  }

  // r_i += sum_k E_ik w_k
  void add_row_sums(Totals<T>& totals) {
    const T* w = scratch_.weight;
    const T* plan = scratch_.plan.data();
    const int64_t rows = scores_.num_rows, width = width_, padded = padded_;
    double* row_sums = totals.row_sums;
    for (int64_t i = 0; i < rows; ++i) {
      const T* e = plan + i * width;
      Vec<T> x{}, y{}, z{}, t{};
      int64_t k = 0;
      for (; k + 4 * kLanes<T> <= padded; k += 4 * kLanes<T>) {
        x += load(e + k) * load(w + k);
        y += load(e + k + kLanes<T>) * load(w + k + kLanes<T>);
        z += load(e + k + 2 * kLanes<T>) * load(w + k + 2 * kLanes<T>);
        t += load(e + k + 3 * kLanes<T>) * load(w + k + 3 * kLanes<T>);
      }
      for (; k < padded; k += kLanes<T>) x += load(e + k) * load(w + k);
      row_sums[i] += reduce_sum<T>((x + y) + (z + t));
    }
  }

  const Scores<S>& scores_;
  int64_t begin_, cols_, width_, padded_;
  Scratch<T>& scratch_;
};

// Scratch memory of one solve at a time.
template <typename S>
struct Workspace {
  using T = Compute<S>;
  Workspace(int64_t num_rows, int64_t num_cols, int64_t workers)
      : width(block_cols<S>(num_rows)),
        blocks((num_cols + width - 1) / width),
        chunks(std::min(kMaxChunks, blocks)),
        row_sums(chunks * num_rows),
        totals(chunks) {
    for (int64_t w = 0; w < workers; ++w) scratch.push_back(std::make_unique<Scratch<T>>(num_rows, width));
  }
  int64_t width, blocks, chunks;
  std::vector<double> row_sums;  // [chunks, n]
  std::vector<Totals<T>> totals;
  std::vector<std::unique_ptr<Scratch<T>>> scratch;
};

// One iteration over all columns: v_new and, per row, sum_k of the plan with scaled columns, in row_sums of the first chunk.
template <typename S, typename T = Compute<S>>
Totals<T> iterate_columns(const Scores<S>& scores, const T* u, const T* v_old, const T* b, T* v_new, Workspace<S>& work) {
  std::fill(work.row_sums.begin(), work.row_sums.end(), 0.0);
  parallel_items(work.scratch.size(), work.chunks, [&](int64_t worker, int64_t chunk) {
    Totals<T> totals{work.row_sums.data() + chunk * scores.num_rows};
    for (int64_t block = chunk * work.blocks / work.chunks; block < (chunk + 1) * work.blocks / work.chunks; ++block) {
      const int64_t begin = block * work.width, cols = std::min(work.width, scores.num_cols - begin);
      Block<S>(scores, begin, cols, work.width, *work.scratch[worker]).iterate(u, v_old, b, v_new, totals);
    }
    work.totals[chunk] = totals;
  });
  Totals<T> all{work.row_sums.data()};
  for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
    all.largest_weight = std::max(all.largest_weight, work.totals[chunk].largest_weight);
    all.error += work.totals[chunk].error;
    if (chunk == 0) continue;
    for (int64_t i = 0; i < scores.num_rows; ++i) all.row_sums[i] += work.row_sums[chunk * scores.num_rows + i];
  }
  return all;
}

// u_i += log2(a_i / r_i); rows whose sum is not to be trusted are summed in the log domain.
template <typename S, typename T = Compute<S>>
void scale_rows(const Scores<S>& scores, const T* a, const T* v, const Totals<T>& totals, T* u, int64_t workers) {
  std::vector<int64_t> lost;
  for (int64_t i = 0; i < scores.num_rows; ++i) {
    if (!(a[i] > 0)) continue;  // stays at -inf
    const double sum = totals.row_sums[i];
    if (sum < kLost<T> * totals.largest_weight) {
      lost.push_back(i);
    } else {
      u[i] += static_cast<T>(std::log2(a[i] / sum));
    }
  }
  parallel_items(workers, lost.size(), [&](int64_t, int64_t index) {
    T peak = kMinusInfinity<T>, sum = 0;
    update_row_statistics(scores, lost[index], v, peak, sum);
    u[lost[index]] = std::log2(a[lost[index]]) - (peak + std::log2(sum));
  });
}

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

// plan_ik = 2^(s_ik + u_i + v_k). streaming: past the caches, for a result that does not fit them.
template <typename S, typename T = Compute<S>>
void write_plan(const Scores<S>& scores, const T* u, const T* v, T* plan, bool streaming, int64_t workers) {
  const int64_t col_blocks = (scores.num_cols + kPlanCols - 1) / kPlanCols, row_blocks = (scores.num_rows + kPlanRows - 1) / kPlanRows;
  parallel_items(workers, col_blocks * row_blocks, [&](int64_t, int64_t index) {
    const int64_t begin = index / row_blocks * kPlanCols, cols = std::min(kPlanCols, scores.num_cols - begin);
    const int64_t first = index % row_blocks * kPlanRows, last = std::min(first + kPlanRows, scores.num_rows);
    alignas(64) T scale[kPlanCols];
    for (int64_t k = 0; k < cols; ++k) scale[k] = scores.factor * (scores.col_scale ? scores.col_scale[begin + k] : T(1));
    const int64_t whole = cols / kLanes<T> * kLanes<T>;
    for (int64_t i = first; i < last; ++i) {
      const S* s = scores.data + i * scores.row_stride + begin;
      T* p = plan + i * scores.num_cols + begin;
      auto entry = [&](int64_t k) { return exp2(load_widened(s + k) * load(scale + k) + (load(v + begin + k) + u[i])); };
      if (streaming && reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0) {
        for (int64_t k = 0; k < whole; k += kLanes<T>) store_streaming<T>(p + k, entry(k));
      } else {
        for (int64_t k = 0; k < whole; k += kLanes<T>) store(p + k, entry(k));
      }
      for (int64_t k = whole; k < cols; ++k) {
        p[k] = exp2(broadcast<T>(widen(s[k]) * scale[k] + (v[begin + k] + u[i])))[0];
      }
    }
  });
}

template <typename S>
class Solve {
 public:
  using T = Compute<S>;
  explicit Solve(const comp_kernels_sinkhorn_params& p)
      : p_(p), streaming_(p.num_items * p.num_rows * p.num_cols * static_cast<int64_t>(sizeof(T)) > kStreamingBytes) {}

  void run() {
    const int64_t workers = num_workers();
    if (p_.tol < 0 && p_.num_items >= workers) {
      // Whole items one after another: an item that fits the cache is read from memory once for all iterations.
      std::vector<std::unique_ptr<Workspace<S>>> work(workers);
      parallel_items(workers, p_.num_items, [&](int64_t worker, int64_t g) {
        if (!work[worker]) work[worker] = std::make_unique<Workspace<S>>(p_.num_rows, p_.num_cols, 1);
        begin(g);
        for (int64_t iter = 0; iter < p_.num_iters; ++iter) iterate(g, iter == 0, v(g), *work[worker], 1);
        finish(g, 1);
      });
      return;
    }
    Workspace<S> work(p_.num_rows, p_.num_cols, workers);
    if (p_.tol < 0) {
      for (int64_t g = 0; g < p_.num_items; ++g) {
        begin(g);
        for (int64_t iter = 0; iter < p_.num_iters; ++iter) iterate(g, iter == 0, v(g), work, workers);
        finish(g, workers);
      }
    } else {
      run_until_converged(work, workers);
      for (int64_t g = 0; g < p_.num_items; ++g) finish(g, workers);
    }
  }

 private:
  Scores<S> scores(int64_t g) const {
    return {static_cast<const S*>(p_.scores) + g * p_.item_stride, p_.row_stride, p_.num_rows, p_.num_cols, nullptr,
            static_cast<T>(p_.factor)};
  }
  const T* a(int64_t g) const { return static_cast<const T*>(p_.row_marginals) + g * p_.row_marginals_stride; }
  const T* b(int64_t g) const { return static_cast<const T*>(p_.col_marginals) + g * p_.col_marginals_stride; }
  T* u(int64_t g) const { return static_cast<T*>(p_.u) + g * p_.num_rows; }
  T* v(int64_t g) const { return static_cast<T*>(p_.v) + g * p_.num_cols; }

  void begin(int64_t g) {
    for (int64_t i = 0; i < p_.num_rows; ++i) u(g)[i] = a(g)[i] > 0 ? T(0) : kMinusInfinity<T>;
  }

  // One iteration of item g into v_new (may be its v); returns the columns' L1 error before it.
  double iterate(int64_t g, bool first, T* v_new, Workspace<S>& work, int64_t workers) {
    const Totals<T> totals = iterate_columns(scores(g), u(g), first ? nullptr : v(g), b(g), v_new, work);
    scale_rows(scores(g), a(g), v_new, totals, u(g), workers);
    return totals.error;
  }

  // The error after an iteration is known once the next one has summed the columns; that one is then dropped.
  void run_until_converged(Workspace<S>& work, int64_t workers) {
    for (int64_t g = 0; g < p_.num_items; ++g) {
      begin(g);
      iterate(g, true, v(g), work, workers);
    }
    const int64_t cols = p_.num_items * p_.num_cols, rows = p_.num_items * p_.num_rows;
    std::vector<T> v_before(cols), u_before(rows);
    for (int64_t iter = 1; iter < p_.num_iters; ++iter) {
      std::copy_n(v(0), cols, v_before.data());
      std::copy_n(u(0), rows, u_before.data());
      bool converged = true;
      for (int64_t g = 0; g < p_.num_items; ++g) {
        double mass = 0;
        for (int64_t i = 0; i < p_.num_rows; ++i) mass += a(g)[i];
        converged &= iterate(g, false, v(g), work, workers) <= p_.tol * mass;
      }
      if (converged) {
        std::copy_n(v_before.data(), cols, v(0));
        std::copy_n(u_before.data(), rows, u(0));
        return;
      }
    }
  }

  void finish(int64_t g, int64_t workers) {
    if (p_.plan) {
      write_plan(scores(g), u(g), v(g), static_cast<T*>(p_.plan) + g * p_.num_rows * p_.num_cols, streaming_, workers);
    }
    constexpr T kLn2 = T(0.69314718055994530942);
    for (int64_t i = 0; i < p_.num_rows; ++i) u(g)[i] *= kLn2;
    for (int64_t k = 0; k < p_.num_cols; ++k) v(g)[k] *= kLn2;
  }

  const comp_kernels_sinkhorn_params& p_;
  bool streaming_;
};

// One step over a tile; the members are the C entry points' work.
template <typename S>
class Step {
 public:
  using T = Compute<S>;
  explicit Step(const comp_kernels_sinkhorn_step_params& p)
      : p_(p),
        scores_{static_cast<const S*>(p.scores), p.row_stride, p.num_rows, p.num_cols, static_cast<const T*>(p.col_scale),
                static_cast<T>(p.factor)},
        u_(static_cast<const T*>(p.u2)),
        v_(static_cast<const T*>(p.v2)) {}

  void iterate() {
    Workspace<S> work(p_.num_rows, p_.num_cols, num_workers());
    const Totals<T> totals =
        iterate_columns(scores_, u_, v_, static_cast<const T*>(p_.col_marginals), static_cast<T*>(p_.v2_new), work);
    for (int64_t i = 0; i < p_.num_rows; ++i) static_cast<double*>(p_.row_sums)[i] += totals.row_sums[i];
    T& largest = *static_cast<T*>(p_.largest_weight);
    largest = std::max(largest, totals.largest_weight);
  }

  void column_statistics() {
    Workspace<S> work(p_.num_rows, p_.num_cols, num_workers());
    parallel_items(work.scratch.size(), work.blocks, [&](int64_t worker, int64_t block) {
      const int64_t begin = block * work.width, cols = std::min(work.width, p_.num_cols - begin);
      Block<S>(scores_, begin, cols, work.width, *work.scratch[worker])
          .statistics(u_, static_cast<T*>(p_.peaks), static_cast<T*>(p_.sums));
    });
  }

  void row_statistics() {
    parallel_items(num_workers(), p_.num_rows, [&](int64_t, int64_t i) {
      if (u_ && u_[i] == kMinusInfinity<T>) return;
      update_row_statistics(scores_, i, v_, static_cast<T*>(p_.peaks)[i], static_cast<T*>(p_.sums)[i]);
    });
  }

  void plan() { write_plan(scores_, u_, v_, static_cast<T*>(p_.plan), /*streaming=*/false, num_workers()); }

 private:
  const comp_kernels_sinkhorn_step_params& p_;
  const Scores<S> scores_;
  const T *u_, *v_;
};

}  // namespace

const char* sinkhorn_solve(const comp_kernels_sinkhorn_params& p) {
  return for_dtype(p.dtype, [&](auto type) { Solve<decltype(type)>(p).run(); });
}

const char* sinkhorn_iterate(const comp_kernels_sinkhorn_step_params& p) {
  return for_dtype(p.dtype, [&](auto type) { Step<decltype(type)>(p).iterate(); });
}

const char* sinkhorn_column_statistics(const comp_kernels_sinkhorn_step_params& p) {
  return for_dtype(p.dtype, [&](auto type) { Step<decltype(type)>(p).column_statistics(); });
}

const char* sinkhorn_row_statistics(const comp_kernels_sinkhorn_step_params& p) {
  return for_dtype(p.dtype, [&](auto type) { Step<decltype(type)>(p).row_statistics(); });
}

const char* sinkhorn_plan(const comp_kernels_sinkhorn_step_params& p) {
  return for_dtype(p.dtype, [&](auto type) { Step<decltype(type)>(p).plan(); });
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
