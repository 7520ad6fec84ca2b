// The arguments of rope_attention as they cross the C ABI, one struct for forward and backward, CPU and CUDA.
//
// Letters: T, Tk tokens of queries and keys, Hq, Hkv heads (Hq % Hkv == 0), D head_dim, R rotary_dim, B sequences,
// W table_width = R or R / 2. "compute" is float, or double when dtype is COMP_KERNELS_FLOAT64.
// Strides count elements. A pointer may be null only where that is said.
#pragma once

#include <stdint.h>

#include "dtypes.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  // Inputs of both passes.
  const void* q;                // [T, Hq, D] dtype, strides q_stride_*, last dimension contiguous
  const void* k;                // [Tk, Hkv, D] dtype, strides k_stride_*
  const void* v;                // [Tk, Hkv, D] dtype, strides v_stride_*
  const void* cos;              // [T, W], or [T, Hq, W] when table_heads == Hq; compute, contiguous; null: no rotation
  const void* sin;              // as cos; null when cos is
  const void* cos_k;            // [Tk, W], or [Tk, Hkv, W] when table_heads_k == Hkv; null: no rotation of the keys
  const void* sin_k;            // as cos_k; null when cos_k is
  const int32_t* cu_seqlens;    // [B + 1], from 0, never decreasing, last <= T
  const int32_t* cu_seqlens_k;  // [B + 1], from 0, never decreasing, last <= Tk

  // Written by forward, read by backward. Rows from cu_seqlens[B] on: out = 0, lse = -inf.
  void* out;  // [T, Hq, D] dtype, contiguous
  // Natural logarithm, scale included. Double for every dtype: at logits of 1e4 the rounding of a float lse
  // would scale whole rows of the recomputed probabilities by 5e-4, in a pass that is otherwise exact to 1e-7.
  void* lse;  // [Hq, T] contiguous

  // Backward only; null in forward.
  const void* grad_out;  // [T, Hq, D] dtype, strides grad_out_stride_*, last dimension contiguous
  const void* grad_lse;  // [Hq, T] as lse; may be null: zero
  void* dq;              // [T, Hq, D] dtype, contiguous; rows from cu_seqlens[B] on are zeroed, as in the rest
  void* dk;              // [Tk, Hkv, D] dtype, contiguous
  void* dv;              // [Tk, Hkv, D] dtype, contiguous
  void* dcos;            // [T, Hq, W] compute, contiguous, one gradient per head; null: not wanted
  void* dsin;            // as dcos; null when dcos is
  void* dcos_k;          // [Tk, Hkv, W] compute, contiguous; null: not wanted
  void* dsin_k;          // as dcos_k; null when dcos_k is

  int64_t q_stride_token, q_stride_head;
  int64_t k_stride_token, k_stride_head;
  int64_t v_stride_token, v_stride_head;
  int64_t grad_out_stride_token, grad_out_stride_head;

  int64_t num_tokens;     // T
  int64_t num_tokens_k;   // Tk
  int64_t num_sequences;  // B
  int64_t num_heads;      // Hq
  int64_t num_heads_k;    // Hkv
  int64_t head_dim;       // D, even, at most 256
  int64_t rotary_dim;     // R, even, at most D
  int64_t pair_stride;    // p: within blocks of 2p, channel j pairs with channel j + p; 2p divides R
  int64_t table_width;    // W, of the queries' and the keys' tables alike
  int64_t table_heads;    // 1 or Hq
  int64_t table_heads_k;  // 1 or Hkv

  double scale;   // softmax(scale * q . k)
  int64_t dtype;  // of q, k, v, out and their gradients: one of COMP_KERNELS_*
  int64_t tf32;   // CUDA, float32: whether factors of products may be rounded to TF32 (11 significant bits); 0: float32 accuracy
} comp_kernels_rope_attention_params;

#ifdef __cplusplus
}
#endif
