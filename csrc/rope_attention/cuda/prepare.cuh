// What runs before attention: the tile lists are made from cu_seqlens, and every row of the keys (in backward of the queries
// too) is turned once into a workspace, so that no attention block ever repeats a rotation.
#pragma once

#include "rope_attention.h"
#include "rotate.cuh"
#include "tiles.cuh"

namespace comp_kernels {

struct RotateJob {
  const void* x;  // [tokens, heads, head_dim]
  void* turned;   // [heads, tokens, head_dim] contiguous
  const int32_t* cu_seqlens;
  Tables tables;
  int64_t stride_token, stride_head;
  int tokens, heads;
};

// What backward needs to know about every query row.
struct __align__(8) RowStats {
  float lse_log2;  // log2 of the softmax denominator, rounded
  float delta;     // sum_d dout out - dlse: dS = P (dP - delta)
};

// Where lse_log2 is so large that its rounding shows beside that of 16-bit weights (2^-12 here), weights are computed from
// `low` too, what lse_log2 lacks, and from scores that are scaled before anything is subtracted, as in forward.
constexpr float kHugeLog2 = 4096.f;

__device__ __forceinline__ float exact_weight(float score, float scale_log2, float lse_log2, float low) {
  const float x = __fsub_rn(__fsub_rn(__fmul_rn(score, scale_log2), lse_log2), low);
  float bounded;  // above 1 a weight is only by what rounding leaves of huge logits; NaN stays NaN
  asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(bounded) : "f"(x));
  return exp2_approx(bounded);
}

struct StatsJob {
  const void* out;         // [T, Hq, D] contiguous
  const void* grad_out;    // [T, Hq, D]
  const double* lse;       // [Hq, T]
  const double* grad_lse;  // [Hq, T], or null
  RowStats* stats;         // [Hq, T]
  float* low;              // [Hq, T], see kHugeLog2
  int* huge;               // [Hq, blocks of 128 rows]: whether one of the rows is beyond kHugeLog2
  const int32_t* cu_seqlens;
  int64_t stride_token, stride_head;  // of grad_out
  int tokens, heads;
};

struct PrepareParams {
  ListJob lists[2];
  RotateJob rotations[2];
  StatsJob stats;
  int num_lists, num_rotations;
  int sequences, head_dim;
};

constexpr int kPrepareThreads = 256;
constexpr int kPrepareRows = 128;  // rows per block

// Blocks that a job over all rows of all heads takes.
__host__ __device__ inline int row_blocks(int tokens, int heads) { return (tokens + kPrepareRows - 1) / kPrepareRows * heads; }

template <typename T>
__device__ void rotate_block(const RotateJob& job, int block, int sequences, int head_dim) {
  const int blocks_per_head = (job.tokens + kPrepareRows - 1) / kPrepareRows;
  const int head = block / blocks_per_head, first = (block - head * blocks_per_head) * kPrepareRows;
  const int rows = min(kPrepareRows, job.cu_seqlens[sequences] - first);  // the slack beyond is never read
  const Element<T>* x = elements<T>(job.x) + head * job.stride_head + first * job.stride_token;
  Element<T>* turned = elements<T>(job.turned) + (static_cast<int64_t>(head) * job.tokens + first) * head_dim;
  const int64_t table = static_cast<int64_t>(first) * job.tables.token_stride + head * job.tables.head_stride;
  rotate_rows<T>(threadIdx.x, kPrepareThreads, rows, head_dim, job.tables, [&](int row, auto turn_row) {
    Element<T>* to = turned + row * head_dim;
    const int64_t table_row = table + row * job.tables.token_stride;
    turn_row([&](int channel) { return to + channel; }, x + row * job.stride_token, job.tables.cos + table_row,
             job.tables.sin + table_row);
  });
}

// Statistics of one row and what they lack.
__device__ __forceinline__ RowStats row_stats(double lse, float delta, float& low) {
  const double exact = lse * kLog2EDouble;
  const float rounded = static_cast<float>(exact);
  low = fabsf(rounded) == kInfinity ? 0.f : static_cast<float>(exact - rounded);
  return {rounded, delta};
}

template <typename T>
__device__ void stats_block(const StatsJob& job, int block, int sequences, int head_dim) {
  constexpr int kLanes = 8;  // per row
  const int blocks_per_head = (job.tokens + kPrepareRows - 1) / kPrepareRows;
  const int head = block / blocks_per_head, first = (block - head * blocks_per_head) * kPrepareRows;
  const int end = min(first + kPrepareRows, job.cu_seqlens[sequences]), lane = threadIdx.x % kLanes;
  bool huge = false;
  for (int i = 0; i < kPrepareRows; i += kPrepareThreads / kLanes) {
    const int token = first + i + threadIdx.x / kLanes;
    float delta = 0.f;
    if (token < end) {
      const Element<T>* out = elements<T>(job.out) + (static_cast<int64_t>(token) * job.heads + head) * head_dim;
      const Element<T>* grad_out = elements<T>(job.grad_out) + token * job.stride_token + head * job.stride_head;
      for (int c = lane * 8; c < head_dim; c += kLanes * 8) {
        const Packed<T, 8> o = *reinterpret_cast<const Packed<T, 8>*>(out + c);
        const Packed<T, 8> g = *reinterpret_cast<const Packed<T, 8>*>(grad_out + c);
        add_product<T>(delta, o, g);
      }
    }
    delta = octet_sum(delta);
    if (lane == 0 && token < end) {
      const int64_t at = static_cast<int64_t>(head) * job.tokens + token;
      if (job.grad_lse != nullptr) delta -= static_cast<float>(job.grad_lse[at]);
      const RowStats stats = row_stats(job.lse[at], delta, job.low[at]);
      job.stats[at] = stats;
      huge |= fabsf(stats.lse_log2) > kHugeLog2;
    }
  }
  huge = __syncthreads_or(huge);
  if (threadIdx.x == 0) job.huge[block] = huge;
}

// Whether a row of the packed tensor from `first` to `last` may be huge: the same for the whole warp. huge: of their head.
__device__ __forceinline__ bool any_huge(const int* huge, int first, int last) {
  int found = 0;
  for (int block = first / kPrepareRows + threadIdx.x % 32; block <= last / kPrepareRows; block += 32) found |= huge[block];
  return __any_sync(0xffffffffu, found);
}

// Grid: num_lists blocks, then row_blocks of every rotation, then of the stats (backward only).
template <typename T>
__device__ __forceinline__ void prepare(const PrepareParams& params) {
  int block = blockIdx.x;
  if (block < params.num_lists) {
    const ListJob& job = params.lists[block];
    list_tiles<kPrepareThreads>(job.tiles, job.cu_seqlens, job.cu_seqlens_other, params.sequences, job.tokens, job.tile);
    return;
  }
  block -= params.num_lists;
  for (int which = 0; which < params.num_rotations; ++which) {
    const RotateJob& job = params.rotations[which];
    const int blocks = row_blocks(job.tokens, job.heads);
    if (block < blocks) return rotate_block<T>(job, block, params.sequences, params.head_dim);
    block -= blocks;
  }
  stats_block<T>(params.stats, block, params.sequences, params.head_dim);
}

}  // namespace comp_kernels

// T: what stands in the kernel's name, and an element type.
#define INSTANTIATE_PREPARE(T)                                                           \
  DEFINE_KERNEL(rope_attention_prepare_##T, PrepareParams, prepare, prepare_kernel, (T), \
                (FixedBlock<kPrepareThreads, kPrepareRows>), kRows)
