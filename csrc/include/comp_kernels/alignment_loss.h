// The arguments of alignment_loss's kernel as they cross the C ABI: loss and gradient over one tile of prototypes.
//
// Letters: n rows (samples), C prototypes of the tile. "compute" is float, or double when dtype is COMP_KERNELS_FLOAT64. Strides
// count elements. A pointer may be null only where that is said. Names ending in 2 are logarithms in bits.
#pragma once

#include <stdint.h>

#include "dtypes.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const void* text;        // [n, C] compute, stride text_stride: products of text features and raw prototypes
  void* vision;            // [n, C] compute, stride vision_stride: the same of vision features; the gradient in return
  const void* col_scale;   // [C] compute: one over the norm of each prototype; null: ones
  const void* u2;          // [n] compute: target_ik = 2^(text_ik * col_scale_k * text_factor + u2_i + v2_k) * target_weight_i
  const void* v2;          // [C] compute; null: zeros
  const void* target_weight;  // [n] compute
  const void* peaks2;      // [n] compute: prediction_ik = 2^(vision_ik * col_scale_k * vision_factor - peaks2_i) / sums_i
  const void* sums;        // [n] compute. Maximum and sum apart: a logarithm of the sum near 1,000 would be rounded to 1e-4
  const void* row_weight;  // [n] compute: weight of the row in the loss; 0: the row is skipped, its gradient zero
  void* row_loss2;         // [n] double: - sum_k target log2 prediction is added, not yet weighted
  int64_t text_stride, vision_stride;
  int64_t num_rows;      // n
  int64_t num_cols;      // C
  double text_factor;    // log2(e) / epsilon
  double vision_factor;  // log2(e) / temperature
  double grad_factor;    // 1 / temperature
  int64_t gradient;      // 1: vision_ik becomes (prediction - target)_ik * row_weight_i * grad_factor * col_scale_k; 0: it stays
  int64_t dtype;         // COMP_KERNELS_FLOAT32 or COMP_KERNELS_FLOAT64
} comp_kernels_alignment_loss_params;

#ifdef __cplusplus
}
#endif
