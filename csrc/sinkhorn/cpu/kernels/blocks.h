// Sinkhorn from the scores: an iteration, or one of its pieces, over blocks of columns, with no memory of the matrix's size.
//
// A block of columns over all rows stays in the second level cache: its E = 2^(s + u + v) is taken from the scores, its columns
// are summed and scaled, and its share of the row sums is taken while it is there. Row sums are added in fixed chunks of columns,
// so that the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/score_tile.h"
#include "loops.h"
#include "range.h"

namespace comp_kernels::COMP_KERNELS_ISA {

constexpr int64_t kTileBytes = 128 * 1024;  // E of one block of columns
constexpr int64_t kMaxBlockCols = 1024, kMinBlockCols = 32;
constexpr int64_t kMaxColumnChunks = 64;  // pieces of the columns
constexpr int64_t kPlanCols = 2048, kPlanRows = 64;

template <typename S>
int64_t block_cols(int64_t num_rows) {
  using T = Compute<S>;
  const int64_t fitting = kTileBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(num_rows, 1);
  return std::clamp(fitting / kLanes<T> * kLanes<T>, kMinBlockCols, kMaxBlockCols);
}

// Scratch of one worker: E of a block, padded to whole vectors, and what belongs to its columns.
template <typename T>
struct BlockScratch {
  explicit BlockScratch(int64_t num_rows, int64_t cols) : e(num_rows * cols) {}
  std::vector<T> e;  // [n, cols]
  alignas(64) T scale[kMaxBlockCols], shift[kMaxBlockCols], sum[kMaxBlockCols], weight[kMaxBlockCols], target[kMaxBlockCols];
};

// One iteration over all columns: what it starts from, and where it goes.
template <typename T>
struct Pass {
  const T* u;        // [n] potentials of the rows
  const T* v;        // [K] of the columns; null: no iteration yet
  const T* b;        // [K] target of the columns
  T* v_new;          // [K] written; may be v
};

// What a pass over some columns adds up.
template <typename T>
struct Totals {
  double* row_sums;      // [n] sum_k E_ik w_k
  T largest_weight = 0;
};

template <typename S>
class Block {
 public:
  using T = Compute<S>;
  Block(const Scores<S>& scores, int64_t begin, int64_t cols, int64_t width, BlockScratch<T>& scratch)
      : scores_(scores), begin_(begin), cols_(cols), width_(width), padded_(round_up(cols, kLanes<T>)), scratch_(scratch) {}

  void iterate(const Pass<T>& pass, bool peaks_first, Totals<T>& totals) {
    std::copy_n(pass.b + begin_, cols_, scratch_.target);
    std::fill(scratch_.target + cols_, scratch_.target + padded_, T(0));
    if (pass.v == nullptr) {
      first_exponentials(pass, peaks_first);
    } else {
      next_exponentials(pass);
    }
    weigh(totals);
    add_log2(scratch_.weight, scratch_.shift, padded_);
    std::copy_n(scratch_.shift, cols_, pass.v_new + begin_);
    for (int64_t i = 0; i < scores_.num_rows; ++i) {
      totals.row_sums[i] += weighted_row_sum(scratch_.e.data() + i * width_, scratch_.weight, padded_);
    }
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

  void first_exponentials(const Pass<T>& pass, bool peaks_first) {
    set_scales();
    if (!peaks_first) {
      std::fill_n(scratch_.shift, padded_, T(0));
      exponentials(pass.u);
      if (serves_without_shift(scratch_.sum, cols_)) return;
    }
    take_peaks(pass.u);
    exponentials(pass.u);
  }

  void next_exponentials(const Pass<T>& pass) {
    set_scales();
    for (int64_t k = 0; k < padded_; ++k) scratch_.shift[k] = k < cols_ ? pass.v[begin_ + k] : kMinusInfinity<T>;
    exponentials(pass.u);
    if (any_lost(scratch_.sum, scratch_.target, cols_)) {
      take_peaks(pass.u);
      exponentials(pass.u);
    }
  }

  // Calls f with rows of whole vectors: those of the last, narrower block are copied and padded first.
  template <typename F>
  CK_INLINE void with_rows(F&& f) {
    if (padded_ == cols_) {
      f(scores_.data + begin_, scores_.row_stride);
      return;
    }
    for (int64_t i = 0; i < scores_.num_rows; ++i) {
      const S* row = scores_.data + i * scores_.row_stride + begin_;
      for (int64_t k = 0; k < padded_; ++k) scratch_.e[i * width_ + k] = k < cols_ ? widen(row[k]) : kMinusInfinity<T>;
    }
    f(static_cast<const T*>(scratch_.e.data()), width_);
  }

  void take_peaks(const T* u) {
    with_rows([&](auto* scores, int64_t stride) {
      column_peaks(scores, stride, scores_.num_rows, padded_, scratch_.scale, u, scratch_.shift);
    });
  }

  void exponentials(const T* u) {
    with_rows([&](auto* scores, int64_t stride) {
      column_exponentials(scores, stride, scores_.num_rows, padded_, scratch_.scale, scratch_.shift, u, scratch_.e.data(), width_,
                          scratch_.sum);
    });
  }

  void weigh(Totals<T>& totals) {
    const T largest = column_weights(scratch_.sum, padded_, scratch_.target, scratch_.weight);
    totals.largest_weight = std::max(totals.largest_weight, largest);
  }

  const Scores<S>& scores_;
  int64_t begin_, cols_, width_, padded_;
  BlockScratch<T>& scratch_;
};

// Memory of passes over matrices of one size.
template <typename S>
struct BlockWorkspace {
  using T = Compute<S>;
  BlockWorkspace(int64_t num_rows, int64_t num_cols, int64_t workers)
      : width(block_cols<S>(num_rows)),
        blocks((num_cols + width - 1) / width),
        chunks(std::min(kMaxColumnChunks, blocks)),
        row_sums(chunks * num_rows),
        totals(chunks) {
    for (int64_t w = 0; w < workers; ++w) scratch.push_back(std::make_unique<BlockScratch<T>>(num_rows, width));
  }
  int64_t width, blocks, chunks;
  std::vector<double> row_sums;  // [chunks, n]
  std::vector<Totals<T>> totals;
  std::vector<std::unique_ptr<BlockScratch<T>>> scratch;
};

// One iteration over all columns; the row sums are those of the first chunk.
template <typename S, typename T = Compute<S>>
Totals<T> iterate_columns(const Scores<S>& scores, const Pass<T>& pass, BlockWorkspace<S>& work) {
  const bool peaks_first = pass.v == nullptr && spans_many_bits(scores);
  std::fill(work.row_sums.begin(), work.row_sums.end(), 0.0);
  parallel_shares(work.scratch.size(), work.chunks, /*backwards=*/false, [&](int64_t worker, int64_t chunk) {
    Totals<T> totals{work.row_sums.data() + chunk * scores.num_rows};
    for (int64_t block = chunk * work.blocks / work.chunks; block < (chunk + 1) * work.blocks / work.chunks; ++block) {
      const int64_t begin = block * work.width, cols = std::min(work.width, scores.num_cols - begin);
      Block<S>(scores, begin, cols, work.width, *work.scratch[worker]).iterate(pass, peaks_first, totals);
    }
    work.totals[chunk] = totals;
  });
  Totals<T> all{work.row_sums.data()};
  for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
    all.largest_weight = std::max(all.largest_weight, work.totals[chunk].largest_weight);
    if (chunk == 0) continue;
    for (int64_t i = 0; i < scores.num_rows; ++i) all.row_sums[i] += work.row_sums[chunk * scores.num_rows + i];
  }
  return all;
}

// plan_ik = 2^(s_ik + u_i + v_k). streaming: past the caches, for a result that does not fit them.
template <typename S, typename T = Compute<S>>
void write_plan(const Scores<S>& scores, const T* u, const T* v, T* plan, bool streaming, int64_t workers) {
  const int64_t col_blocks = (scores.num_cols + kPlanCols - 1) / kPlanCols,
                row_blocks = (scores.num_rows + kPlanRows - 1) / kPlanRows;
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

}  // namespace comp_kernels::COMP_KERNELS_ISA
