// Sinkhorn iterations in the log domain, base 2, as memory-bound passes over the scores with 16-byte accesses.
//
//     columns:  v_k = log2 b_k - log2 sum_i 2^(s_ik factor + u_i)      rows:  u_i = log2 a_i - log2 sum_k 2^(s_ik factor + v_k)
//
// Every pass reads the scores once. Rows of the column pass are split over blocks to fill the device: each block leaves one
// (peak, sum) per column, and a small kernel merges them. The last row pass writes the plan while the row is in cache.
#pragma once

#include "entries.cuh"
#include "sinkhorn.h"

namespace comp_kernels {

struct SinkhornParams {
  const void* scores;          // [items, rows, cols], strides item_stride, row_stride
  const float* row_marginals;  // [rows] per item, stride row_marginals_stride (0: shared); null: ones
  const float* col_marginals;  // [cols] per item; null: col_share each
  float* u2;                   // [items, rows], in bits; null in a column pass: no iteration yet
  float* v2;                   // [items, cols], in bits
  float* u;                    // natural logarithms of the same, written along; null: not wanted
  float* v;
  float* plan;      // [items, rows, cols]; null: not wanted
  float* peaks;     // [items, cols]: peaks and sums of the columns instead of v2; null: not wanted
  float* sums;
  float* row_sums;  // [items, rows]: log2 of the row sums instead of u2; null: not wanted
  float2* partial;  // [items, chunks, cols]: (peak, sum) over the rows of one chunk
  int64_t item_stride, row_stride;  // elements
  int64_t row_marginals_stride, col_marginals_stride;
  int rows, cols, chunks, chunk_rows;
  float factor;     // log2(e) / epsilon
  float col_share;  // rows / cols
};

constexpr int kSinkhornThreads = 256;

// Grid: [tiles of 32 kVec columns, items * chunks]. A lane owns kVec columns, the eight warps take every eighth row.
template <typename T, int kVec>
__device__ __forceinline__ void sinkhorn_columns(const SinkhornParams& params) {
  constexpr int kWarps = kSinkhornThreads / 32, kRowsAtOnce = 4;
  __shared__ float2 sums[kWarps][32 * kVec];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int item = blockIdx.y / params.chunks, chunk = blockIdx.y % params.chunks;
  const int first_col = blockIdx.x * 32 * kVec, col = first_col + lane * kVec;
  const int end = min(params.rows, (chunk + 1) * params.chunk_rows);
  LogSum own[kVec];
  if (col < params.cols) {
    const int64_t base = item * params.item_stride + col;
    for (int row = chunk * params.chunk_rows + warp; row < end; row += kWarps * kRowsAtOnce) {
      float x[kRowsAtOnce][kVec];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int i = row + r * kWarps;
        if (i < end) load_scores<T, kVec>(x[r], params.scores, base + i * params.row_stride);
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int i = row + r * kWarps;
        float u2 = -kInfinity;  // a row that is not there weighs nothing
        if (i < end) {
          if (params.u2) {
            u2 = params.u2[static_cast<int64_t>(item) * params.rows + i];
          } else if (marginal(params.row_marginals, item * params.row_marginals_stride + i, 1.f) != 0.f) {
            u2 = 0.f;
          }
        }
#pragma unroll
        for (int c = 0; c < kVec; ++c) x[r][c] = i < end ? entry(x[r][c], params.factor, u2) : -kInfinity;
      }
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
        const float column[kRowsAtOnce] = {x[0][c], x[1][c], x[2][c], x[3][c]};
        own[c].add(column);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kVec; ++c) sums[warp][c * 32 + lane] = own[c].pair();  // neighbouring lanes, neighbouring banks
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kVec; i += kSinkhornThreads) {
    LogSum all;
    for (int w = 0; w < kWarps; ++w) all.add(LogSum(sums[w][i]));
    const int k = first_col + i % 32 * kVec + i / 32;
    if (k < params.cols) {
      params.partial[static_cast<int64_t>(blockIdx.y) * params.cols + k] = all.pair();
    }
  }
}

// Grid: [tiles of kSinkhornThreads columns, items]. Merges the chunks of the column pass.
__device__ __forceinline__ void sinkhorn_merge(const SinkhornParams& params) {
  const int k = blockIdx.x * kSinkhornThreads + threadIdx.x, item = blockIdx.y;
  if (k >= params.cols) return;
  LogSum all;
  for (int chunk = 0; chunk < params.chunks; ++chunk) {
    all.add(LogSum(params.partial[(static_cast<int64_t>(item) * params.chunks + chunk) * params.cols + k]));
  }
  const int64_t at = static_cast<int64_t>(item) * params.cols + k;
  if (params.peaks != nullptr) {
    params.peaks[at] = all.peak, params.sums[at] = all.sum;
    return;
  }
  const float target = marginal(params.col_marginals, item * params.col_marginals_stride + k, params.col_share);
  const float v2 = potential(target, all.log2());
  params.v2[at] = v2;
  if (params.v != nullptr) params.v[at] = v2 * kLn2;
}

// Row `at` of the plan, by all threads of a block; four columns per thread, so that its stores fill whole sectors.
template <typename T, int kVec>
__device__ __forceinline__ void write_plan_row(const SinkhornParams& params, int64_t scores, const float* v2, float u2,
                                               int64_t at) {
  constexpr int kCols = kVec == 1 ? 1 : 4;
  float* plan = params.plan + at * params.cols;
  for (int k = threadIdx.x * kCols; k < params.cols; k += kSinkhornThreads * kCols) {
    float x[kCols], v[kCols];
    load_scores<T, kCols>(x, params.scores, scores + k);
    load_potentials<kCols>(v, v2 + k);
#pragma unroll
    for (int i = 0; i < kCols; ++i) x[i] = exp2_approx(entry(x[i], params.factor, u2) + v[i]);
    if constexpr (kCols == 1) {
      plan[k] = x[0];
    } else {
      *reinterpret_cast<float4*>(plan + k) = float4{x[0], x[1], x[2], x[3]};
    }
  }
}

// Grid: [rows, items]; one block per row.
template <typename T, int kVec>
__device__ __forceinline__ void sinkhorn_rows(const SinkhornParams& params) {
  __shared__ float2 sums[kSinkhornThreads / 32];
  const int row = blockIdx.x, item = blockIdx.y;
  const int64_t scores = item * params.item_stride + row * params.row_stride;
  const float* v2 = params.v2 + static_cast<int64_t>(item) * params.cols;
  LogSum own;
  for (int k = threadIdx.x * kVec; k < params.cols; k += kSinkhornThreads * kVec) {
    float x[kVec], v[kVec];
    load_scores<T, kVec>(x, params.scores, scores + k);
    load_potentials<kVec>(v, v2 + k);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = entry(x[i], params.factor, v[i]);
    own.add(x);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    own.add(LogSum(float2{__shfl_xor_sync(0xffffffffu, own.peak, step), __shfl_xor_sync(0xffffffffu, own.sum, step)}));
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = own.pair();
  __syncthreads();
  LogSum all;
#pragma unroll
  for (int w = 0; w < kSinkhornThreads / 32; ++w) all.add(LogSum(sums[w]));

  const int64_t at = static_cast<int64_t>(item) * params.rows + row;
  if (params.row_sums != nullptr) {
    if (threadIdx.x == 0) params.row_sums[at] = all.log2();
    return;
  }
  const float u2 = potential(marginal(params.row_marginals, item * params.row_marginals_stride + row, 1.f), all.log2());
  if (threadIdx.x == 0) {
    params.u2[at] = u2;
    if (params.u != nullptr) params.u[at] = u2 * kLn2;
  }
  if (params.plan != nullptr) write_plan_row<T, kVec>(params, scores, v2, u2, at);
}

// Grid: [rows, items]: the plan from given potentials.
template <typename T, int kVec>
__device__ __forceinline__ void sinkhorn_plan(const SinkhornParams& params) {
  const int row = blockIdx.x, item = blockIdx.y;
  const int64_t at = static_cast<int64_t>(item) * params.rows + row;
  write_plan_row<T, kVec>(params, item * params.item_stride + row * params.row_stride,
                          params.v2 + static_cast<int64_t>(item) * params.cols, params.u2[at], at);
}

}  // namespace comp_kernels

#define INSTANTIATE_SINKHORN_PASS(pass, T, kVec)                                                                      \
  DEFINE_KERNEL(sinkhorn_##pass##_##T##_##kVec, SinkhornParams, sinkhorn_##pass, sinkhorn_##pass##_kernel, (T, kVec), \
                (FixedBlock<kSinkhornThreads, 1>), kRows)
#define INSTANTIATE_SINKHORN(T, kVec)         \
  INSTANTIATE_SINKHORN_PASS(columns, T, kVec) \
  INSTANTIATE_SINKHORN_PASS(rows, T, kVec)    \
  INSTANTIATE_SINKHORN_PASS(plan, T, kVec)
