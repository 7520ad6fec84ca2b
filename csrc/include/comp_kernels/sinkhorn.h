// The arguments of the sinkhorn kernels as they cross the C ABI.
//
// Letters: G batch items, n rows, K columns. "compute" is float, or double when dtype is COMP_KERNELS_FLOAT64. Strides count
// elements. A pointer may be null only where that is said. Marginals are not negative.
//
// Kernels work in base 2: the logarithm of an entry of the plan is scores * col_scale * factor + u + v *in bits*, with
// factor = log2(e) / epsilon. Potentials are in bits wherever the name ends in 2.
#pragma once

#include <stdint.h>

#include "dtypes.h"

#ifdef __cplusplus
extern "C" {
#endif

// A whole solve, comp_kernels_cpu_sinkhorn_solve.
typedef struct {
  const void* scores;         // [G, n, K] dtype, strides item_stride and row_stride, last dimension contiguous
  const void* row_marginals;  // [n] per item, compute, item stride row_marginals_stride (0: shared); null: ones
  const void* col_marginals;  // [K] per item, compute, item stride col_marginals_stride (0: shared); null: n / K
  void* u;                    // [G, n] compute, contiguous: written, natural logarithm
  void* v;                    // [G, K] compute, contiguous: written, natural logarithm
  void* plan;                 // [G, n, K] compute, contiguous: written
  int64_t item_stride, row_stride;
  int64_t row_marginals_stride, col_marginals_stride;
  int64_t num_items;   // G
  int64_t num_rows;    // n
  int64_t num_cols;    // K
  int64_t num_iters;   // at least 1
  double factor;       // log2(e) / epsilon
  double tol;          // stop once the L1 error of every item's column sums is at most tol * their sum; negative: never
  int64_t dtype;       // of scores
} comp_kernels_sinkhorn_params;

// One step over a matrix of scores or over a tile of its columns; each function below says which results it writes. The sums of
// several tiles, or of several processes, are merged by the caller.
typedef struct {
  const void* scores;         // [n, K] dtype, stride row_stride, last dimension contiguous
  const void* col_scale;      // [K] compute, multiplies the scores of a column; null: ones
  const void* col_marginals;  // [K] compute (iterate)
  const void* u2;             // [n] compute; -inf: the row takes no part
  const void* v2;             // [K] compute; null: zeros (row_statistics), no iteration yet (iterate)
  void* v2_new;               // [K] compute (iterate); may be v2
  void* row_sums;             // [n] double, added to (iterate)
  void* largest_weight;       // [1] compute, raised (iterate)
  void* peaks;                // [K] or [n] compute: maxima in bits (column_statistics, row_statistics)
  void* sums;                 // same shape, compute: sums of 2^(entry - peak)
  void* plan;                 // [n, K] compute, contiguous (plan)
  int64_t row_stride;
  int64_t num_rows;  // n
  int64_t num_cols;  // K
  double factor;
  int64_t dtype;
} comp_kernels_sinkhorn_step_params;

#ifdef __cplusplus
}
#endif
