// Marginals that a call leaves out, made before the kernels see it.
#pragma once

#include <new>
#include <vector>

#include "comp_kernels/dtypes.h"

namespace comp_kernels {

// run(params with both marginals): ones for the rows, n / K for each column, where they are null.
template <typename Params, typename Run>
const char* with_marginals(Params params, Run&& run) {
  const auto fill_and_run = [&](auto zero) {
    std::vector<decltype(zero)> rows, cols;
    if (params.row_marginals == nullptr) {
      rows.assign(params.num_rows, 1);
      params.row_marginals = rows.data();
    }
    if (params.col_marginals == nullptr) {
      cols.assign(params.num_cols, static_cast<decltype(zero)>(static_cast<double>(params.num_rows) / params.num_cols));
      params.col_marginals = cols.data();
    }
    return run(params);
  };
  try {
    return params.dtype == COMP_KERNELS_FLOAT64 ? fill_and_run(double{}) : fill_and_run(float{});
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}

}  // namespace comp_kernels
