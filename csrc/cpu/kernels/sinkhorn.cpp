// Sinkhorn: exponentials once per solve, then iterations on the plan itself.
//
// With potentials u, v,
//     E_ik = 2^(s_ik + u_i + v_k),    P_ik = x_i E_ik w_k                            x, w = 1 so far
//     c_k  = sum_i x_i E_ik,          w_k = b_k / c_k                                the columns are brought to b
//     r_i  = sum_k E_ik w_k,          x_i = a_i / r_i                                then the rows to a
// The first iteration has no potentials: E is taken as it is where its column sums stay well inside the range of floating point,
// else with each column's maximum subtracted. E is written to the memory of a result and serves all iterations: a
// block of columns is read once per iteration, its columns summed, scaled, and its share of the row sums taken from the
// cache. Where x grows too uneven for E to hold every term that counts, E is taken again from the scores with the potentials
// reached, u_i + log2 x_i and v_k + log2 w_k; that is also how tiles of scores are iterated that have no memory for E.
#include "../sinkhorn.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../parallel.h"
#include "score_tile.h"
#include "sinkhorn_loops.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

constexpr int64_t kTileBytes = 128 * 1024;  // E of one block of columns: stays in the second level cache
constexpr int64_t kMaxBlockCols = 1024, kMinBlockCols = 32;
constexpr int64_t kStreamingBytes = 16 << 20;  // matrices beyond this are written past the caches
constexpr int64_t kCacheBytes = 20 << 20;  // assumption: as much E as this stays in the last level cache between iterations
constexpr int64_t kMaxChunks = 64;      // pieces of the columns, fixed, so that sums do not depend on the number of threads
constexpr int64_t kPlanCols = 2048, kPlanRows = 64;
constexpr int64_t kNarrowBytes = 64 * 1024;  // rows up to this are iterated row by row: a few of them stay in the second level cache
constexpr int64_t kMinChunkRows = 64;
// A row sum below this share of the largest weight may have lost terms below the smallest normal number: take it again.
template <typename T>
constexpr T kLost = sizeof(T) == 4 ? T(1e-20) : T(1e-200);
// E serves while the largest x is at most this many times the smallest: what E lost below 2^-126 then stays without weight.
constexpr double kUneven = 1e12;
// Column sums of E without a shift must lie between these, and it is not tried where a sample of entries exceeds so many bits.
constexpr double kLeastSum = 1e-12, kLargestSum = 1e18;
constexpr double kSampleBits = 40;

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
  alignas(64) T scale[kMaxBlockCols], shift[kMaxBlockCols], sum[kMaxBlockCols], weight[kMaxBlockCols], target[kMaxBlockCols];
};

// One iteration over all columns: where E comes from, what is wanted, and where it goes.
template <typename T>
struct Pass {
  const T* u;        // [n] E comes from the scores with these potentials; null: from kept_plan
  const T* v;        // [K] the same; null: no iteration yet
  const T* x;        // [n] weights of the rows of kept_plan
  const T* b;        // [K] target of the columns
  T* base_v;         // [K] v of E: written when E comes from the scores
  T* w;              // [K] written
  T* kept_plan = nullptr;  // [n, K] E: written when it comes from the scores; null: there is no memory for it
  bool streaming = false;  // kept_plan is written past the caches
  bool peaks_first = false;  // without v: shift by the columns' maxima at once
  bool measure = false;    // add up the columns' error
  bool backwards = false;  // last columns first: they are still in the caches from the pass before
};

// What a pass over some columns adds up.
template <typename T>
struct Totals {
  double* row_sums;      // [n] sum_k E_ik w_k
  T largest_weight = 0;
  double error = 0;      // sum_k |c_k - b_k| before the columns were scaled; not in the first iteration
};

template <typename S>
class Block {
 public:
  using T = Compute<S>;
  Block(const Scores<S>& scores, int64_t begin, int64_t cols, int64_t width, Scratch<T>& scratch)
      : scores_(scores), begin_(begin), cols_(cols), width_(width), padded_(round_up(cols, kLanes<T>)), scratch_(scratch) {}

  void iterate(const Pass<T>& pass, Totals<T>& totals) {
    std::copy_n(pass.b + begin_, cols_, scratch_.target);
    std::fill(scratch_.target + cols_, scratch_.target + padded_, T(0));
    if (pass.u == nullptr) {
      recall(pass);
    } else if (pass.v == nullptr) {
      first_exponentials(pass);
    } else {
      next_exponentials(pass);
    }
    if (pass.measure) totals.error += error(pass);
    weigh(totals);
    std::copy_n(scratch_.weight, cols_, pass.w + begin_);
    if (pass.u != nullptr) std::copy_n(scratch_.shift, cols_, pass.base_v + begin_);
    add_row_sums(pass, totals.row_sums);
  }

  // Per column the largest entry (-inf: no mass) and the sum of 2^(entry - largest).
  void statistics(const T* u, T* peaks, T* sums) {
    set_scales();
    take_peaks(u);
    exponentials(u);
    for (int64_t k = 0; k < cols_; ++k) {
      peaks[begin_ + k] = scratch_.sum[k] > 0 ? -scratch_.shift[k] : kMinusInfinity<T>;
      sums[begin_ + k] = scratch_.sum[k];
    }
  }

 private:
  void set_scales() {
    for (int64_t k = 0; k < padded_; ++k) {
      scratch_.scale[k] = scores_.factor * (k < cols_ && scores_.col_scale ? scores_.col_scale[begin_ + k] : T(1));
    }
  }

  void first_exponentials(const Pass<T>& pass) {
    set_scales();
    if (!pass.peaks_first) {
      std::fill_n(scratch_.shift, padded_, T(0));
      exponentials(pass.u);
      if (all_within(scratch_.sum, cols_, kLeastSum, kLargestSum)) return;
    }
    take_peaks(pass.u);
    exponentials(pass.u);
  }

  void next_exponentials(const Pass<T>& pass) {
    set_scales();
    for (int64_t k = 0; k < padded_; ++k) scratch_.shift[k] = k < cols_ ? pass.v[begin_ + k] : kMinusInfinity<T>;
    exponentials(pass.u);
    if (lost_columns()) {
      take_peaks(pass.u);
      exponentials(pass.u);
    }
  }

  // Calls f with rows of whole vectors: those of the last, narrower block are copied and padded first.
  template <typename Row, typename F>
  CK_INLINE void with_rows(const Row* rows, int64_t stride, T padding, F&& f) {
    if (padded_ == cols_) {
      f(rows + begin_, stride);
      return;
    }
    for (int64_t i = 0; i < scores_.num_rows; ++i) {
      for (int64_t k = 0; k < padded_; ++k) {
        scratch_.plan[i * width_ + k] = k < cols_ ? widen(rows[i * stride + begin_ + k]) : padding;
      }
    }
    f(static_cast<const T*>(scratch_.plan.data()), width_);
  }

  void take_peaks(const T* u) {
    with_rows(scores_.data, scores_.row_stride, kMinusInfinity<T>, [&](auto* scores, int64_t stride) {
      column_peaks(scores, stride, scores_.num_rows, padded_, scratch_.scale, u, scratch_.shift);
    });
  }

  void exponentials(const T* u) {
    with_rows(scores_.data, scores_.row_stride, kMinusInfinity<T>, [&](auto* scores, int64_t stride) {
      column_exponentials(scores, stride, scores_.num_rows, padded_, scratch_.scale, scratch_.shift, u, scratch_.plan.data(), width_,
                          scratch_.sum);
    });
  }

  void recall(const Pass<T>& pass) {
    with_rows(pass.kept_plan, scores_.num_cols, T(0), [&](const T* kept, int64_t stride) {
      weighted_column_sums(kept, stride, scores_.num_rows, padded_, pass.x, scratch_.plan.data(), width_, scratch_.sum);
    });
  }

  bool lost_columns() const {
    bool lost = false;
    for (int64_t k = 0; k < cols_; ++k) lost |= scratch_.sum[k] < kLost<T> && scratch_.target[k] > 0;
    return lost;
  }

  double error(const Pass<T>& pass) const {
    double error = 0;
    for (int64_t k = 0; k < cols_; ++k) {
      if (!(scratch_.target[k] > 0)) continue;
      T sum = scratch_.sum[k];
      if (pass.u == nullptr) {
        sum *= pass.w[begin_ + k];
      } else if (scratch_.shift[k] != pass.v[begin_ + k]) {  // the sum was taken again, below its peak
        sum *= std::exp2(pass.v[begin_ + k] - scratch_.shift[k]);
      }
      error += std::abs(static_cast<double>(sum - scratch_.target[k]));
    }
    return error;
  }

  void weigh(Totals<T>& totals) {
    Vec<T> largest = broadcast(totals.largest_weight);
    for (int64_t k = 0; k < padded_; k += kLanes<T>) {
      const Vec<T> target = load(scratch_.target + k);
      const Vec<T> weight = target == Vec<T>{} ? Vec<T>{} : target / load(scratch_.sum + k);  // NaN stays NaN
      store(scratch_.weight + k, weight);
      largest = max<T>(weight, largest);
    }
    totals.largest_weight = reduce_max<T>(largest);
  }

  // r_i += sum_k E_ik w_k; and E is kept where there is room.
  void add_row_sums(const Pass<T>& pass, double* row_sums) {
    const T *e = scratch_.plan.data(), *w = scratch_.weight;
    T* kept = pass.u != nullptr && pass.kept_plan != nullptr ? pass.kept_plan + begin_ : nullptr;
    const int64_t rows = scores_.num_rows, stride = scores_.num_cols, width = width_, padded = padded_, cols = cols_;
    for (int64_t i = 0; i < rows; ++i) {
      row_sums[i] += weighted_row_sum(e + i * width, w, padded);
      if (kept != nullptr) copy_row(e + i * width, kept + i * stride, cols, pass.streaming);
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
        totals(chunks),
        narrow(num_cols * static_cast<int64_t>(sizeof(T)) <= kNarrowBytes),
        row_chunks(std::clamp(num_rows / kMinChunkRows, int64_t{1}, kMaxChunks)),
        column_sums(narrow ? row_chunks * num_cols : 0) {
    for (int64_t w = 0; w < workers; ++w) scratch.push_back(std::make_unique<Scratch<T>>(num_rows, width));
  }
  int64_t width, blocks, chunks;
  std::vector<double> row_sums;  // [chunks, n]
  std::vector<Totals<T>> totals;
  std::vector<std::unique_ptr<Scratch<T>>> scratch;
  bool narrow;
  int64_t row_chunks;
  std::vector<T> column_sums;  // [row chunks, K], narrow matrices only
};

// One iteration over all columns; the row sums are those of the first chunk.
template <typename S, typename T = Compute<S>>
Totals<T> iterate_columns(const Scores<S>& scores, const Pass<T>& pass, Workspace<S>& work) {
  std::fill(work.row_sums.begin(), work.row_sums.end(), 0.0);
  parallel_shares(work.scratch.size(), work.chunks, pass.backwards, [&](int64_t worker, int64_t chunk) {
    Totals<T> totals{work.row_sums.data() + chunk * scores.num_rows};
    for (int64_t block = chunk * work.blocks / work.chunks; block < (chunk + 1) * work.blocks / work.chunks; ++block) {
      const int64_t begin = block * work.width, cols = std::min(work.width, scores.num_cols - begin);
      Block<S>(scores, begin, cols, work.width, *work.scratch[worker]).iterate(pass, totals);
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

// v = base + log2 w
template <typename T>
void column_potentials(const T* base, const T* w, T* v, int64_t cols) {
  int64_t k = 0;
  for (; k + kLanes<T> <= cols; k += kLanes<T>) store(v + k, load(base + k) + log2<T>(load(w + k)));
  for (; k < cols; ++k) v[k] = base[k] + log2<T>(broadcast(w[k]))[0];
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
      if (streaming && streamable(p)) {
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

// What an item's plan is made of between iterations: E in the memory of a result while it serves (`kept`), and
//     u_i = base_u_i + log2 x_i,   v_k = base_v_k + log2 w_k.
template <typename T>
struct Scalings {
  Scalings(int64_t rows, int64_t cols) : base_u(rows), x(rows), base_v(cols), w(cols) {}
  T* e = nullptr;  // [n, K] memory of E: this plan, or one whose turn comes later; null where no plan is wanted
  std::vector<T> base_u, x;  // [n]
  std::vector<T> base_v, w;  // [K]
  bool kept = false;
  bool written = false;  // the memory of the result holds the plan already
};

template <typename S>
class Solve {
 public:
  using T = Compute<S>;
  // The threads that work on one item, and their memory.
  struct Team {
    Team(int64_t rows, int64_t cols, int64_t workers) : work(rows, cols, workers), scalings(rows, cols) {}
    Workspace<S> work;
    Scalings<T> scalings;
  };

  explicit Solve(const comp_kernels_sinkhorn_params& p) : p_(p) {}

  void run() {
    const int64_t workers = num_workers();
    if (p_.tol >= 0) {
      Workspace<S> work(p_.num_rows, p_.num_cols, workers);
      run_until_converged(work, workers);
      return;
    }
    // All iterations of an item before the next: if its E fits the cache, its scores are read from memory once. Every thread takes
    // an item of its own, or all share one: where there are fewer than threads, or only one at a time fits.
    const int64_t bytes = p_.num_rows * p_.num_cols * static_cast<int64_t>(sizeof(T));
    const bool one_fits = bytes <= kCacheBytes, all_fit = workers * bytes <= kCacheBytes;
    const int64_t teams = p_.num_items >= workers && (all_fit || !one_fits) ? workers : 1;
    // A batch beyond the cache keeps E apart from its plans, which are written past the cache: their lines are not read first and
    // do not drive out E. Its memory is that of the last plans, which are then made in place.
    const int64_t apart = p_.plan && one_fits && p_.num_items * bytes > kCacheBytes ? p_.num_items - teams : 0;
    std::vector<std::unique_ptr<Team>> team(teams);
    auto run_on = [&](int64_t t, int64_t g, int64_t place) {
      if (!team[t]) team[t] = std::make_unique<Team>(p_.num_rows, p_.num_cols, workers / teams);
      team[t]->scalings.e = plan(place);
      run_item(g, team[t]->scalings, team[t]->work, workers / teams);
    };
    parallel_shares(teams, apart, /*backwards=*/false, [&](int64_t t, int64_t g) { run_on(t, g, apart + t); });
    parallel_items(teams, p_.num_items - apart, [&](int64_t t, int64_t g) { run_on(t, apart + g, apart + g); });
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
  T* plan(int64_t g) const { return p_.plan ? static_cast<T*>(p_.plan) + g * p_.num_rows * p_.num_cols : nullptr; }
  bool streaming() const { return p_.num_rows * p_.num_cols * static_cast<int64_t>(sizeof(T)) > kStreamingBytes; }

  void run_item(int64_t g, Scalings<T>& scalings, Workspace<S>& work, int64_t workers) {
    begin(g, scalings);
    int64_t iter = 0;
    while (iter < p_.num_iters) {
      const int64_t done = iter;
      if (work.narrow && (iter == 0 || scalings.kept)) iter = iterate_rows(g, iter, scalings, work, workers);
      if (iter == done) iterate(g, iter++, scalings, work, workers);
    }
    finish(g, scalings, workers);
  }

  void begin(int64_t g, Scalings<T>& scalings) {
    scalings.kept = scalings.written = false;
    for (int64_t i = 0; i < p_.num_rows; ++i) u(g)[i] = a(g)[i] > 0 ? T(0) : kMinusInfinity<T>;
  }

  // Iterations by whole rows: once a row is scaled it is at hand for the columns' sums of the next iteration, or for the plan, so
  // each iteration reads E once. Goes on to the last one or until E does not serve; returns the number of those done.
  int64_t iterate_rows(int64_t g, int64_t iter, Scalings<T>& scalings, Workspace<S>& work, int64_t workers) {
    const int64_t rows = p_.num_rows, cols = p_.num_cols, chunks = work.row_chunks;
    const Scores<S> s = scores(g);
    if (p_.plan == nullptr || (iter == 0 && spans_many_bits(s))) return iter;
    T *e = scalings.e, *sums = work.column_sums.data();
    const bool streaming = e != plan(g) && cols % kLanes<T> == 0 && streamable(plan(g));
    auto for_chunks = [&](auto&& f) {  // f(first row, rows, column sums of the chunk), the sums then added up
      std::fill(work.column_sums.begin(), work.column_sums.end(), T(0));
      parallel_shares(workers, chunks, iter % 2 == 1, [&](int64_t, int64_t chunk) {
        const int64_t first = chunk * rows / chunks, end = (chunk + 1) * rows / chunks;
        f(first, end - first, sums + chunk * cols);
      });
      merge_parts(sums, chunks, cols);
    };
    if (iter == 0) {
      for_chunks([&](int64_t first, int64_t count, T* sum) {
        add_exponential_rows(s.data + first * s.row_stride, s.row_stride, count, cols, s.factor, u(g) + first, e + first * cols, sum);
      });
      if (!all_within(sums, cols, kLeastSum, kLargestSum)) return iter;
      std::copy_n(u(g), rows, scalings.base_u.data());
      std::fill(scalings.base_v.begin(), scalings.base_v.end(), T(0));
      scalings.kept = true;
    } else {
      for_chunks([&](int64_t first, int64_t count, T* sum) {
        add_weighted_rows(e + first * cols, count, cols, scalings.x.data() + first, sum);
      });
    }
    for (; iter < p_.num_iters && scalings.kept; ++iter) {
      Totals<T> totals{work.row_sums.data()};
      totals.largest_weight = column_weights(sums, cols, b(g), scalings.w.data());
      scalings.written = iter + 1 == p_.num_iters;
      for_chunks([&](int64_t first, int64_t count, T* sum) {
        scale_rows_and_go_on(e + first * cols, count, cols, a(g) + first, scalings.w.data(), totals.row_sums + first,
                             scalings.written ? nullptr : sum, plan(g) + first * cols, streaming);
      });
      scale_rows(g, s, totals, scalings, workers);
    }
    return iter;
  }

  // One iteration of item g; returns the columns' L1 error before it. Afterwards u(g), and v(g) unless E is kept, are current.
  double iterate(int64_t g, int64_t iter, Scalings<T>& scalings, Workspace<S>& work, int64_t workers) {
    const Scores<S> s = scores(g);
    Pass<T> pass{nullptr, nullptr, scalings.x.data(), b(g), scalings.base_v.data(), scalings.w.data(), scalings.e};
    pass.measure = p_.tol >= 0 && iter > 0;
    pass.backwards = iter % 2 == 1;
    if (!scalings.kept) {
      std::copy_n(u(g), p_.num_rows, scalings.base_u.data());
      pass.u = scalings.base_u.data();
      pass.v = iter == 0 ? nullptr : v(g);
      pass.peaks_first = iter == 0 && spans_many_bits(s);
      pass.streaming = streaming();
    }
    const Totals<T> totals = iterate_columns(s, pass, work);
    scale_rows(g, s, totals, scalings, workers);
    return totals.error;
  }

  // x_i = a_i / r_i; rows whose sum is not to be trusted are summed in the log domain.
  void scale_rows(int64_t g, const Scores<S>& s, const Totals<T>& totals, Scalings<T>& scalings, int64_t workers) {
    std::vector<int64_t> lost;
    double least = std::numeric_limits<double>::infinity(), largest = 0;
    for (int64_t i = 0; i < p_.num_rows; ++i) {
      scalings.x[i] = 0;
      if (!(a(g)[i] > 0)) continue;  // stays at -inf
      const double sum = totals.row_sums[i], x = a(g)[i] / sum;
      if (sum < kLost<T> * totals.largest_weight) {
        lost.push_back(i);
        continue;
      }
      scalings.x[i] = static_cast<T>(x);
      u(g)[i] = scalings.base_u[i] + static_cast<T>(std::log2(x));
      least = std::min(least, x), largest = std::max(largest, x);
    }
    scalings.kept = p_.plan != nullptr && lost.empty() && largest <= kUneven * least;
    if (scalings.kept) return;
    column_potentials(scalings.base_v.data(), scalings.w.data(), v(g), p_.num_cols);
    parallel_items(workers, lost.size(), [&](int64_t, int64_t index) {
      const int64_t i = lost[index];
      T peak = kMinusInfinity<T>, sum = 0;
      update_row_statistics(s, i, v(g), peak, sum);
      u(g)[i] = std::log2(a(g)[i]) - (peak + std::log2(sum));
    });
  }

  // The error after an iteration is known once the next one has summed the columns; that one is then dropped.
  void run_until_converged(Workspace<S>& work, int64_t workers) {
    std::vector<Scalings<T>> now(p_.num_items, Scalings<T>(p_.num_rows, p_.num_cols)), before;
    for (int64_t g = 0; g < p_.num_items; ++g) {
      now[g].e = plan(g);
      begin(g, now[g]);
      iterate(g, 0, now[g], work, workers);
    }
    const int64_t cols = p_.num_items * p_.num_cols, rows = p_.num_items * p_.num_rows;
    std::vector<T> v_before(cols), u_before(rows);
    for (int64_t iter = 1; iter < p_.num_iters; ++iter) {
      std::copy_n(v(0), cols, v_before.data());
      std::copy_n(u(0), rows, u_before.data());
      before = now;
      bool converged = true;
      for (int64_t g = 0; g < p_.num_items; ++g) {
        double mass = 0;
        for (int64_t i = 0; i < p_.num_rows; ++i) mass += a(g)[i];
        converged &= iterate(g, iter, now[g], work, workers) <= p_.tol * mass;
      }
      if (converged) {
        std::copy_n(v_before.data(), cols, v(0));
        std::copy_n(u_before.data(), rows, u(0));
        now.swap(before);
        break;
      }
    }
    for (int64_t g = 0; g < p_.num_items; ++g) finish(g, now[g], workers);
  }

  void finish(int64_t g, const Scalings<T>& scalings, int64_t workers) {
    if (scalings.kept) {
      column_potentials(scalings.base_v.data(), scalings.w.data(), v(g), p_.num_cols);
      if (!scalings.written) scale_plan(scalings, plan(g), workers);
    } else if (p_.plan) {
      write_plan(scores(g), u(g), v(g), plan(g), streaming(), workers);
    }
    constexpr T kLn2 = T(0.69314718055994530942);
    for (int64_t i = 0; i < p_.num_rows; ++i) u(g)[i] *= kLn2;
    for (int64_t k = 0; k < p_.num_cols; ++k) v(g)[k] *= kLn2;
  }

  // P_ik = x_i E_ik w_k; in the direction opposite to the last pass.
  void scale_plan(const Scalings<T>& scalings, T* plan, int64_t workers) {
    const int64_t num_rows = p_.num_rows, num_cols = p_.num_cols;
    const int64_t blocks = (num_cols + kPlanCols - 1) / kPlanCols;
    const bool backwards = p_.num_iters % 2 == 1;
    parallel_shares(workers, blocks, backwards, [&](int64_t, int64_t block) {
      const int64_t begin = block * kPlanCols;
      const int64_t cols = std::min(kPlanCols, num_cols - begin), whole = cols / kLanes<T> * kLanes<T>;
      const T *w = scalings.w.data() + begin, *x = scalings.x.data();
      for (int64_t i = 0; i < num_rows; ++i) {
        const T* e = scalings.e + i * num_cols + begin;
        T* p = plan + i * num_cols + begin;
        const T row = x[i];
        auto entry = [&](int64_t k) {
          __builtin_prefetch(e + k + num_cols);  // the next row
          return load(e + k) * load(w + k) * row;
        };
        if (e != p && streamable(p)) {
          for (int64_t k = 0; k < whole; k += kLanes<T>) store_streaming<T>(p + k, entry(k));
        } else {
          for (int64_t k = 0; k < whole; k += kLanes<T>) store(p + k, entry(k));
        }
        for (int64_t k = whole; k < cols; ++k) p[k] = e[k] * w[k] * row;
      }
    });
  }

  const comp_kernels_sinkhorn_params& p_;
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
    std::vector<T> base_v(p_.num_cols), w(p_.num_cols);
    Pass<T> pass{u_, v_, nullptr, static_cast<const T*>(p_.col_marginals), base_v.data(), w.data()};
    pass.peaks_first = v_ == nullptr && spans_many_bits(scores_);
    const Totals<T> totals = iterate_columns(scores_, pass, work);
    column_potentials(base_v.data(), w.data(), static_cast<T*>(p_.v2_new), p_.num_cols);
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
