// The arguments of sinkhorn over many small matrices as they cross the C ABI: forward and backward, CPU and CUDA.
//
// Letters and units as in sinkhorn.h. Either side may have at most COMP_KERNELS_SMALL_SIDE entries.
#pragma once

#include <stdint.h>

#include "dtypes.h"

#define COMP_KERNELS_SMALL_SIDE 32

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const void* scores;         // [G, n, K] dtype, items item_stride apart (0: all the same one), each contiguous
  const void* row_marginals;  // [n] per item, compute, item stride row_marginals_stride (0: shared); null: ones
  const void* col_marginals;  // [K] per item, compute, item stride col_marginals_stride (0: shared); null: n / K
  void* u;                    // [G, n] compute, contiguous: written by the forward pass, natural logarithm; backward: null
  void* v;                    // [G, K] likewise
  void* plan;                 // [G, n, K] likewise
  const void* grad_plan;      // [G, n, K] compute, contiguous: gradient of the loss; null: zeros. Forward: null, as all below
  const void* grad_u;         // [G, n] likewise
  const void* grad_v;         // [G, K] likewise
  void* grad_scores;          // [G, n, K] dtype, contiguous: written by the backward pass
  int64_t item_stride;
  int64_t row_marginals_stride, col_marginals_stride;
  int64_t num_items;   // G
  int64_t num_rows;    // n
  int64_t num_cols;    // K
  int64_t num_iters;   // at least 1
  int64_t rows_first;  // 1: an iteration scales the rows, then the columns; 0: the columns, then the rows
  double factor;       // log2(e) / epsilon
  double eps;          // 0, or what is added to the first softmax and to every later sum
  int64_t dtype;       // of scores and grad_scores
} comp_kernels_sinkhorn_small_params;

#ifdef __cplusplus
}
#endif
