// Sinkhorn for scores so far apart that potentials in the computing type have no digits left for what they are the exponents of:
// every half step from the scores, exponents and potentials in double. For inputs that are rare and mostly mistakes: plain loops.
//
//     v_k = log b_k - log sum_i 2^(s_ik + u_i)        u_i = log a_i - log sum_k 2^(s_ik + v_k)        all in bits
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/score_tile.h"

namespace comp_kernels::COMP_KERNELS_ISA {

// Potentials of so many bits are a hundredth of a bit apart in float.
template <typename T>
constexpr double kWideBits = sizeof(T) == 4 ? 0x1p17 : 0x1p46;

// log2 of a sum of 2^entry. Each entry is taken once, so that none is above the maximum by its rounding; NaN stays.
struct LogSum {
  double peak = -std::numeric_limits<double>::infinity(), sum = 0;

  void add(double entry) {
    if (entry == -std::numeric_limits<double>::infinity()) return;
    if (entry > peak) {
      sum = sum * std::exp2(peak - entry) + 1;
      peak = entry;
    } else {
      sum += std::exp2(entry - peak);
    }
  }
  double value() const { return peak + std::log2(sum); }
};

inline double potential(double marginal, double log_sum) {
  return marginal == 0 ? -std::numeric_limits<double>::infinity() : std::log2(marginal) - log_sum;
}

// One item; its potentials between half steps.
template <typename S>
class WideItem {
 public:
  using T = Compute<S>;
  WideItem(const Scores<S>& scores, const T* a, const T* b, double factor)
      : scores_(scores), a_(a), b_(b), factor_(factor), u_(scores.num_rows), v_(scores.num_cols), log_sums_(scores.num_cols) {
    for (int64_t i = 0; i < scores.num_rows; ++i) u_[i] = a[i] > 0 ? 0 : -std::numeric_limits<double>::infinity();
  }

  void sum_columns(int64_t workers) {
    constexpr int64_t kCols = 64;
    parallel_items(workers, (scores_.num_cols + kCols - 1) / kCols, [&](int64_t, int64_t block) {
      const int64_t begin = block * kCols, cols = std::min(kCols, scores_.num_cols - begin);
      LogSum sums[kCols];
      for (int64_t i = 0; i < scores_.num_rows; ++i) {
        if (!(a_[i] > 0)) continue;
        for (int64_t k = 0; k < cols; ++k) sums[k].add(entry(i, begin + k) + u_[i]);
      }
      for (int64_t k = 0; k < cols; ++k) log_sums_[begin + k] = sums[k].value();
    });
  }

  // After sum_columns: how far the last iteration left the columns from b.
  double column_error() const {
    double error = 0;
    for (int64_t k = 0; k < scores_.num_cols; ++k) {
      if (b_[k] > 0) error += std::abs(std::exp2(log_sums_[k] + v_[k]) - b_[k]);
    }
    return error;
  }

  // After sum_columns: columns to b, then rows to a.
  void iterate(int64_t workers) {
    for (int64_t k = 0; k < scores_.num_cols; ++k) v_[k] = potential(b_[k], log_sums_[k]);
    parallel_items(workers, scores_.num_rows, [&](int64_t, int64_t i) {
      if (!(a_[i] > 0)) return;
      LogSum sum;
      for (int64_t k = 0; k < scores_.num_cols; ++k) sum.add(entry(i, k) + v_[k]);
      u_[i] = potential(a_[i], sum.value());
    });
  }

  // The plan: of each row its marginal, shared out; u has no part in it.
  void write(T* u, T* v, T* plan, int64_t workers) const {
    for (int64_t i = 0; i < scores_.num_rows; ++i) u[i] = static_cast<T>(u_[i]);
    for (int64_t k = 0; k < scores_.num_cols; ++k) v[k] = static_cast<T>(v_[k]);
    parallel_items(workers, scores_.num_rows, [&](int64_t, int64_t i) {
      T* row = plan + i * scores_.num_cols;
      if (!(a_[i] > 0)) {
        std::fill_n(row, scores_.num_cols, T(0));
        return;
      }
      std::vector<double> entries(scores_.num_cols);
      double peak = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int64_t k = 0; k < scores_.num_cols; ++k) {
        entries[k] = entry(i, k) + v_[k];
        if (entries[k] > peak) peak = entries[k];
      }
      for (double& x : entries) sum += x = std::exp2(x - peak);
      for (int64_t k = 0; k < scores_.num_cols; ++k) row[k] = static_cast<T>(a_[i] * (entries[k] / sum));
    });
  }

 private:
  double entry(int64_t i, int64_t k) const {
    return static_cast<double>(widen(scores_.data[i * scores_.row_stride + k])) * factor_;
  }

  const Scores<S> scores_;
  const T *a_, *b_;
  const double factor_;
  std::vector<double> u_, v_, log_sums_;
};

}  // namespace comp_kernels::COMP_KERNELS_ISA
