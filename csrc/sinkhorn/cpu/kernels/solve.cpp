// Sinkhorn's solve: exponentials once, then iterations on the plan itself.
//
// With potentials u, v of E and weights x, w, all 1 so far,
//     E_ik = 2^(s_ik + u_i + v_k),    P_ik = x_i E_ik w_k
//     c_k  = sum_i x_i E_ik,          w_k = b_k / c_k                                the columns are brought to b
//     r_i  = sum_k E_ik w_k,          x_i = a_i / r_i                                then the rows to a
// The first E has no potentials: it is taken as it is where its column sums stay well inside the range of floating point, else
// with each column's maximum subtracted. It is written to the memory of a result and serves all iterations, each of which reads
// it once: rows that were scaled are still at hand for the column sums of the next iteration, or for the plan. Where x grows
// too uneven for E to hold every term that counts, E is taken again with the potentials reached, u_i + log2 x_i and v_k + log2
// w_k. Where those are too large for their digits, the item starts again in double (wide.h).
#include "../sinkhorn.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/cpu/parallel.h"
#include "blocks.h"
#include "loops.h"
#include "range.h"
#include "wide.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

constexpr int64_t kCacheBytes = 20 << 20;  // assumption: as much E as this stays in the last level cache between iterations
constexpr int64_t kStreamingBytes = 16 << 20;  // plans beyond this that are made from the scores are written past the caches
constexpr int64_t kMergeCols = 8192;  // threads share what is done per column in pieces of so many

// Pieces of the rows, fixed, so that sums do not depend on the number of threads: few and large, because each has column sums of
// its own, but enough for as many threads where there is work for them.
int64_t row_chunks(int64_t num_rows, int64_t row_bytes) {
  constexpr int64_t kMaxChunks = 16, kMinRows = 8, kEnoughRows = 32, kMinBytes = 1 << 20;
  const int64_t rows = std::max({num_rows / kMaxChunks, kMinRows, std::min(num_rows / 8, kEnoughRows), kMinBytes / row_bytes});
  return std::max<int64_t>(num_rows / rows, 1);
}

// An item between its half steps. Its potentials u, v are in the memory of the results: those of E while that is kept, in bits.
template <typename S>
struct Item {
  using T = Compute<S>;
  Item(int64_t rows, int64_t cols, int64_t chunks) : x(rows), w(cols), sums(new T[chunks * cols]), row_sums(rows) {}
  T* e = nullptr;  // [n, K] memory of E: of this plan, or of one whose turn comes later
  std::vector<T> x, w;           // [n], [K]
  std::unique_ptr<T[]> sums;     // [chunks, K] column sums of the coming iteration: in the first row, merged
  std::vector<double> row_sums;  // [n]
  T largest_weight = 0;
  int64_t iter = 0;      // iterations done
  bool kept = false;     // the plan is x E w, and sums are current
  bool written = false;  // the memory of the result holds the plan already
  std::unique_ptr<WideItem<S>> wide;  // in place of all that
};

template <typename S>
class Solve {
 public:
  using T = Compute<S>;
  explicit Solve(const comp_kernels_sinkhorn_params& p)
      : p_(p), chunks_(row_chunks(p.num_rows, p.num_cols * static_cast<int64_t>(sizeof(T)))) {}

  void run() {
    const int64_t workers = num_workers();
    if (p_.tol >= 0) {
      run_until_converged(workers);
      return;
    }
    // All iterations of an item before the next: if its E fits the cache, its scores are read from memory once. Every thread
    // takes an item of its own, or all share one: where there are fewer than threads, or only one at a time fits.
    const int64_t bytes = p_.num_rows * p_.num_cols * static_cast<int64_t>(sizeof(T));
    const bool one_fits = bytes <= kCacheBytes, all_fit = workers * bytes <= kCacheBytes;
    const int64_t teams = p_.num_items >= workers && (all_fit || !one_fits) ? workers : 1;
    // A batch beyond the cache keeps E apart from its plans, which are written past the cache: their lines are not read first and
    // do not drive out E. Its memory is that of the last plans, which are then made in place.
    const int64_t apart = one_fits && p_.num_items * bytes > kCacheBytes ? p_.num_items - teams : 0;
    std::vector<std::unique_ptr<Item<S>>> item(teams);  // made by the thread that uses it
    auto run_on = [&](int64_t t, int64_t g, int64_t place) {
      if (!item[t]) item[t] = std::make_unique<Item<S>>(p_.num_rows, p_.num_cols, chunks_);
      item[t]->e = plan(place);
      run_item(g, *item[t], workers / teams);
    };
    parallel_shares(teams, apart, /*backwards=*/false, [&](int64_t t, int64_t g) { run_on(t, g, apart + t); });
    parallel_items(teams, p_.num_items - apart, [&](int64_t t, int64_t g) { run_on(t, apart + g, apart + g); });
  }

 private:
  Scores<S> scores(int64_t g) const {
    return {static_cast<const S*>(p_.scores) + g * p_.item_stride,
            p_.row_stride,
            p_.num_rows,
            p_.num_cols,
            nullptr,
            static_cast<T>(p_.factor)};
  }
  const T* a(int64_t g) const { return static_cast<const T*>(p_.row_marginals) + g * p_.row_marginals_stride; }
  const T* b(int64_t g) const { return static_cast<const T*>(p_.col_marginals) + g * p_.col_marginals_stride; }
  T* u(int64_t g) const { return static_cast<T*>(p_.u) + g * p_.num_rows; }
  T* v(int64_t g) const { return static_cast<T*>(p_.v) + g * p_.num_cols; }
  T* plan(int64_t g) const { return static_cast<T*>(p_.plan) + g * p_.num_rows * p_.num_cols; }

  void run_item(int64_t g, Item<S>& item, int64_t workers) {
    begin(g, item);
    while (item.iter < p_.num_iters) {
      prepare(g, item, workers);
      iterate(g, item, workers, /*last=*/item.iter + 1 == p_.num_iters);
    }
    finish(g, item, workers);
  }

  void run_until_converged(int64_t workers) {
    std::vector<Item<S>> items;
    for (int64_t g = 0; g < p_.num_items; ++g) {
      items.emplace_back(p_.num_rows, p_.num_cols, chunks_);
      items[g].e = plan(g);
      begin(g, items[g]);
    }
    for (int64_t iter = 0; iter < p_.num_iters; ++iter) {
      bool converged = iter > 0;
      for (int64_t g = 0; g < p_.num_items; ++g) {
        double mass = 0;
        for (int64_t i = 0; i < p_.num_rows; ++i) mass += a(g)[i];
        prepare(g, items[g], workers);
        converged = converged && error_of_columns(g, items[g]) <= p_.tol * mass;
      }
      if (converged) break;
      for (int64_t g = 0; g < p_.num_items; ++g) iterate(g, items[g], workers, /*last=*/false);
    }
    for (int64_t g = 0; g < p_.num_items; ++g) finish(g, items[g], workers);
  }

  void begin(int64_t g, Item<S>& item) {
    item.iter = 0;
    item.kept = item.written = false;
    item.wide.reset();
    for (int64_t i = 0; i < p_.num_rows; ++i) u(g)[i] = a(g)[i] > 0 ? T(0) : kMinusInfinity<T>;
    std::fill_n(v(g), p_.num_cols, T(0));
  }

  // Column sums for the coming iteration, where the last one did not leave them.
  void prepare(int64_t g, Item<S>& item, int64_t workers) {
    if (!item.kept && !item.wide) take_exponentials(g, item, workers);
    if (item.wide) item.wide->sum_columns(workers);
  }

  double error_of_columns(int64_t g, const Item<S>& item) const {
    return item.wide ? item.wide->column_error() : column_error(item.sums.get(), item.w.data(), b(g), p_.num_cols);
  }

  // Where a potential reached, of what is to have mass, has no digits left or is beyond the range: from the beginning, in double.
  bool start_wide(int64_t g, Item<S>& item, const T* potentials, const T* marginals, int64_t count, int64_t workers) {
    bool is_wide = false;
    for (int64_t i = 0; i < count; ++i)
      is_wide |= marginals[i] > 0 && !(std::abs(static_cast<double>(potentials[i])) <= kWideBits<T>);
    if (!is_wide) return false;
    item.wide = std::make_unique<WideItem<S>>(scores(g), a(g), b(g), p_.factor);
    for (int64_t done = 0; done < item.iter; ++done) {
      item.wide->sum_columns(workers);
      item.wide->iterate(workers);
    }
    return true;
  }

  // One iteration on E that is kept; on the way the next column sums or, with `last`, the plan.
  void iterate(int64_t g, Item<S>& item, int64_t workers, bool last) {
    if (item.wide) {
      item.wide->iterate(workers);
      item.iter += 1;
      return;
    }
    weigh_columns(g, item, workers);
    const int64_t cols = p_.num_cols;
    const bool streaming = item.e != plan(g) && cols % kLanes<T> == 0 && streamable(plan(g));
    for_row_chunks(item, workers, /*backwards=*/item.iter % 2 == 0, [&](int64_t first, int64_t count, T* sums) {
      scale_rows_and_go_on(item.e + first * cols, count, cols, a(g) + first, item.w.data(), item.row_sums.data() + first,
                           last ? nullptr : sums, plan(g) + first * cols, streaming);
    });
    if (!last) merge_sums(item, workers, [](Vec<T> x, Vec<T> y) { return x + y; });
    item.written = last;
    item.iter += 1;
    weigh_rows(g, item, workers);
  }

  // f(first row, rows, column sums of the chunk). Each pass begins where the one before ended.
  template <typename F>
  void for_row_chunks(Item<S>& item, int64_t workers, bool backwards, F&& f) {
    parallel_shares(workers, chunks_, backwards, [&](int64_t, int64_t chunk) {
      const int64_t first = chunk * p_.num_rows / chunks_, end = (chunk + 1) * p_.num_rows / chunks_;
      f(first, end - first, item.sums.get() + chunk * p_.num_cols);
    });
  }

  // f(first column, columns)
  template <typename F>
  void for_column_blocks(int64_t workers, F&& f) {
    parallel_items(workers, (p_.num_cols + kMergeCols - 1) / kMergeCols,
                   [&](int64_t, int64_t block) { f(block * kMergeCols, std::min(kMergeCols, p_.num_cols - block * kMergeCols)); });
  }

  template <typename F>
  void merge_sums(Item<S>& item, int64_t workers, F&& merge) {
    if (chunks_ == 1) return;
    for_column_blocks(
        workers, [&](int64_t first, int64_t cols) { merge_parts(item.sums.get() + first, chunks_, p_.num_cols, cols, merge); });
  }

  // E and its column sums from the potentials. The plan stays what it was, so that a solve may end after it.
  void take_exponentials(int64_t g, Item<S>& item, int64_t workers) {
    const bool first = item.iter == 0;
    std::fill(item.x.begin(), item.x.end(), T(1));
    std::fill(item.w.begin(), item.w.end(), T(1));
    item.kept = true;
    if (!first || !spans_many_bits(scores(g))) {
      exponentials(g, item, workers, /*shifted=*/!first);
      if (first ? serves_without_shift(item.sums.get(), p_.num_cols) : !any_lost(item.sums.get(), b(g), p_.num_cols)) return;
    }
    // Below the columns' maxima instead; v becomes that of E, and w what it was.
    for_row_chunks(item, workers, /*backwards=*/true, [&](int64_t row, int64_t count, T* peaks) {
      const Scores<S> s = scores(g);
      peak_rows(s.data + row * s.row_stride, s.row_stride, count, p_.num_cols, s.factor, u(g) + row, peaks);
    });
    merge_sums(item, workers, [](Vec<T> x, Vec<T> y) { return max<T>(x, y); });
    if (start_wide(g, item, item.sums.get(), b(g), p_.num_cols, workers)) return;
    for_column_blocks(workers, [&](int64_t begin, int64_t cols) {
      for (int64_t k = begin; k < begin + cols; ++k) {
        const T shift = std::isfinite(item.sums[k]) ? -item.sums[k] : T(0);
        if (!first) item.w[k] = b(g)[k] > 0 ? std::exp2(v(g)[k] - shift) : T(0);
        v(g)[k] = shift;
      }
    });
    exponentials(g, item, workers, /*shifted=*/true);
  }

  void exponentials(int64_t g, Item<S>& item, int64_t workers, bool shifted) {
    const Scores<S> s = scores(g);
    const int64_t cols = p_.num_cols;
    for_row_chunks(item, workers, /*backwards=*/false, [&](int64_t first, int64_t count, T* sums) {
      const S* rows = s.data + first * s.row_stride;
      if (shifted) {
        exponential_rows<true>(rows, s.row_stride, count, cols, s.factor, u(g) + first, v(g), item.e + first * cols, sums);
      } else {
        exponential_rows<false>(rows, s.row_stride, count, cols, s.factor, u(g) + first, v(g), item.e + first * cols, sums);
      }
    });
    merge_sums(item, workers, [](Vec<T> x, Vec<T> y) { return x + y; });
  }

  void weigh_columns(int64_t g, Item<S>& item, int64_t workers) {
    std::vector<T> largest((p_.num_cols + kMergeCols - 1) / kMergeCols);
    for_column_blocks(workers, [&](int64_t first, int64_t cols) {
      T& of_block = largest[first / kMergeCols];
      of_block = column_weights(item.sums.get() + first, cols, b(g) + first, item.w.data() + first);
    });
    item.largest_weight = *std::max_element(largest.begin(), largest.end());
  }

  // x_i = a_i / r_i. Where E does not serve on, both go into the potentials; rows whose sum is not to be trusted are summed in
  // the log domain.
  void weigh_rows(int64_t g, Item<S>& item, int64_t workers) {
    std::vector<int64_t> lost;
    double least = std::numeric_limits<double>::infinity(), largest = 0;
    for (int64_t i = 0; i < p_.num_rows; ++i) {
      item.x[i] = 0;
      if (!(a(g)[i] > 0)) continue;
      if (item.row_sums[i] < kLost<T> * item.largest_weight) {
        lost.push_back(i);
        continue;
      }
      const double x = a(g)[i] / item.row_sums[i];
      item.x[i] = static_cast<T>(x);
      least = std::min(least, x), largest = std::max(largest, x);
    }
    item.kept = lost.empty() && largest <= kUneven * least;
    if (item.kept) return;
    add_log2(item.w.data(), v(g), p_.num_cols);
    for (int64_t i = 0; i < p_.num_rows; ++i) {
      if (a(g)[i] > 0) u(g)[i] += static_cast<T>(std::log2(a(g)[i] / item.row_sums[i]));
    }
    parallel_items(workers, lost.size(), [&](int64_t, int64_t index) {
      const int64_t i = lost[index];
      T peak = kMinusInfinity<T>, sum = 0;
      update_row_statistics(scores(g), i, v(g), peak, sum);
      u(g)[i] = std::log2(a(g)[i]) - (peak + std::log2(sum));
    });
    if (!start_wide(g, item, u(g), a(g), p_.num_rows, workers)) start_wide(g, item, v(g), b(g), p_.num_cols, workers);
  }

  void finish(int64_t g, const Item<S>& item, int64_t workers) {
    if (item.wide) {
      item.wide->write(u(g), v(g), plan(g), workers);
    } else if (item.kept) {
      for (int64_t i = 0; i < p_.num_rows; ++i) u(g)[i] += std::log2(item.x[i]);
      for_column_blocks(workers, [&](int64_t first, int64_t cols) { add_log2(item.w.data() + first, v(g) + first, cols); });
      if (!item.written) scale_plan(item, plan(g), workers);
    } else {
      const bool streaming = p_.num_rows * p_.num_cols * static_cast<int64_t>(sizeof(T)) > kStreamingBytes;
      write_plan(scores(g), u(g), v(g), plan(g), streaming, workers);
    }
    constexpr T kLn2 = T(0.69314718055994530942);
    for (int64_t i = 0; i < p_.num_rows; ++i) u(g)[i] *= kLn2;
    for (int64_t k = 0; k < p_.num_cols; ++k) v(g)[k] *= kLn2;
  }

  // P_ik = x_i E_ik w_k, in the place of E.
  void scale_plan(const Item<S>& item, T* plan, int64_t workers) const {
    const int64_t cols = p_.num_cols;
    parallel_items(workers, p_.num_rows,
                   [&](int64_t, int64_t i) { scale_row(item.e + i * cols, item.w.data(), item.x[i], cols, plan + i * cols); });
  }

  const comp_kernels_sinkhorn_params& p_;
  const int64_t chunks_;
};

}  // namespace

const char* sinkhorn_solve(const comp_kernels_sinkhorn_params& p) {
  return for_dtype(p.dtype, [&](auto type) { Solve<decltype(type)>(p).run(); });
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
