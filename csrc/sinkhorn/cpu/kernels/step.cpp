// Sinkhorn's single steps over a tile of scores, for callers that hold no matrix of them: alignment_loss, process groups.
#include "../sinkhorn.h"

#include <algorithm>

#include "common/cpu/parallel.h"
#include "blocks.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

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
    BlockWorkspace<S> work(p_.num_rows, p_.num_cols, num_workers());
    const Pass<T> pass{u_, v_, static_cast<const T*>(p_.col_marginals), static_cast<T*>(p_.v2_new)};
    const Totals<T> totals = iterate_columns(scores_, pass, work);
    for (int64_t i = 0; i < p_.num_rows; ++i) static_cast<double*>(p_.row_sums)[i] += totals.row_sums[i];
    T& largest = *static_cast<T*>(p_.largest_weight);
    largest = std::max(largest, totals.largest_weight);
  }

  void column_statistics() {
    BlockWorkspace<S> work(p_.num_rows, p_.num_cols, num_workers());
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
