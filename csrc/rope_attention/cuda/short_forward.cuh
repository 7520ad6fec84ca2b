// rope_attention forward for short sequences (mma.sync, sm_80 and later): one launch, no workspace, no list of tiles.
//
// A block owns up to kRows queries of one sequence and head. Keys are turned in the block, once, into shared memory, values
// come by cp.async; with up to kKeys keys both stay there while the warps walk over the queries, 16 rows at a time. More keys
// come chunk by chunk, and once more for every round of queries: any length is right, long ones are only slower than in the
// kernels made for them. So the host may choose this kernel by the average length alone.
#pragma once

#include "products.cuh"
#include "rope_attention.h"
#include "short_sequences.cuh"
#include "softmax.cuh"
#include "tile_copy.cuh"

namespace comp_kernels {

struct ShortForwardParams {
  ForwardParams attention;  // tiles: null; k as given, not turned
  Tables key_tables;
  const int32_t* cu_seqlens;
  const int32_t* cu_seqlens_k;
  int sequences;
};

// kMostKeys: 64 (many small blocks per multiprocessor) or 256.
template <int kHeadDimension, int kMostKeys>
struct ShortForwardConfig {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kThreads = kMostKeys == 64 ? 128 : 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = 256;                                          // queries per block
  static constexpr int kKeys = kMostKeys > 64 && kHeadDim > 80 ? 208 : kMostKeys;  // in shared memory at a time
  static constexpr int kPadding = 16;
  static constexpr int kColumns = 4;                     // of eight keys per step; registers decide
  static constexpr bool kQueriesInRegisters = false;
  static constexpr int kRowBytes = kPaddedRowBytes<bf16, kHeadDim>;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kWarpBytes = 16 * kRowBytes;  // a warp's queries, then its output
  static constexpr int kSharedBytes = 2 * kTileBytes + kWarps * kWarpBytes;
  static constexpr int kBlocksPerSm = kMostKeys == 64 ? (kHeadDim <= 80 ? 4 : 3) : kHeadDim <= 80 ? 2 : 1;
};

// One warp: 16 queries.
template <typename T, typename Config>
struct ShortForwardWarp : SoftmaxRows<T, Config::kHeadDim, 1> {
  static constexpr int kHeadDim = Config::kHeadDim;
  RowOperand<T, kHeadDim, 1, Config::kQueriesInRegisters> queries;

  __device__ ShortForwardWarp(uint32_t rows, float scale) : SoftmaxRows<T, kHeadDim, 1>(scale), queries(rows) {}

  template <int kColumns, bool kMasked>
  __device__ __forceinline__ void step(uint32_t keys, uint32_t values, bool exact, int exist) {
    Accumulator<1, kColumns> s;
    float sums[1][2];
    while (true) {
      multiply_transposed<T, kHeadDim, 1, Config::kQueriesInRegisters, kColumns>(s, queries, keys);
      if constexpr (kMasked) mask_columns<1, kColumns>(s, exist, this->scale_log2);
      if (exact) this->template raise_reference<kColumns>(s);
      if (!this->template exponentials<kColumns>(s, sums, exact) || exact) break;
      exact = true;
    }
    this->add(sums);
    multiply_add<T, kHeadDim, 1, kColumns>(this->accumulator, s, values);
  }

  // `keys` keys, the first of the sequence among them when `first`.
  __device__ __forceinline__ void attend(uint32_t k, uint32_t v, int keys, bool first) {
    constexpr int kStep = Config::kColumns * 8;
    int at = 0;
#pragma unroll 1
    for (; at + kStep <= keys; at += kStep) {
      step<Config::kColumns, false>(k + at * Config::kRowBytes, v + at * Config::kRowBytes, first && at == 0, 0);
    }
#pragma unroll 1
    for (; at < keys; at += 16) {
      step<2, true>(k + at * Config::kRowBytes, v + at * Config::kRowBytes, first && at == 0, keys - at);
    }
  }
};

template <typename T, int kHeadDim, int kMostKeys>
__device__ __forceinline__ void attention_short_forward(const ShortForwardParams& all) {
  using Config = ShortForwardConfig<kHeadDim, kMostKeys>;
  extern __shared__ __align__(16) char shared[];
  const ForwardParams& params = all.attention;
  const Piece piece = find_piece<Config::kRows>(all.cu_seqlens, all.sequences, params.num_tokens);
  if (piece.rows <= 0) return;
  const bool slack = piece.sequence == all.sequences;
  const int key_start = slack ? 0 : all.cu_seqlens_k[piece.sequence];
  const int keys = slack ? 0 : all.cu_seqlens_k[piece.sequence + 1] - key_start;
  const int head = blockIdx.y, key_head = head / params.heads_per_key_head;
  const int warp_index = threadIdx.x / 32;

  const uint32_t base = shared_address(shared);
  char* own = shared + 2 * Config::kTileBytes + warp_index * Config::kWarpBytes;
  // Keys and values from key `at` on, which no one reads yet or any more.
  auto load_keys = [&](int at, int exist, auto pairs) {
    const Rows k{elements<T>(params.k) + key_head * params.k_stride_head, params.k_stride_token};
    const Rows v{elements<T>(params.v) + key_head * params.v_stride_head, params.v_stride_token};
    copy_rows<T, Config>(v, base + Config::kTileBytes, key_start + at, exist);
    turn_rows<T, Config, Config::kThreads, pairs>(k, shared, key_start + at, exist, key_head, all.key_tables, threadIdx.x);
  };
  const bool resident = keys <= Config::kKeys;
  if (resident && keys > 0) load_keys(0, keys, Constant<false>{});
  for (int round = 0; round < piece.rows; round += Config::kWarps * 16) {
    const int first = round + warp_index * 16, rows = min(16, piece.rows - first);
    if (keys > 0 && rows > 0) {
      const Rows q{elements<T>(params.q) + head * params.q_stride_head, params.q_stride_token};
      turn_rows<T, Config, 32, false>(q, own, piece.row + first, rows, head, params.tables, threadIdx.x % 32);
    }
    ShortForwardWarp<T, Config> warp(shared_address(own), params.scale);
    if (resident) {
      copy_async_commit(), copy_async_wait<0>();
      if (round == 0) __syncthreads();
      __syncwarp();
      if (rows > 0 && keys > 0) warp.attend(base, base + Config::kTileBytes, keys, true);
    } else {
      for (int at = 0; at < keys; at += Config::kKeys) {
        const int exist = min(Config::kKeys, keys - at);
        if (round + at > 0) __syncthreads();  // everyone is done with the chunk before
        load_keys(at, exist, Constant<true>{});
        copy_async_commit(), copy_async_wait<0>();
        __syncthreads();
        if (rows > 0) warp.attend(base, base + Config::kTileBytes, exist, at == 0);
      }
    }
    if (rows > 0) {
      __syncwarp();  // everyone has read the queries, whose place the output takes
      warp.finish(params, own, piece.row + first, rows, head);
      __syncwarp();
    }
  }
}

}  // namespace comp_kernels

#define INSTANTIATE_SHORT_FORWARD(T, kHeadDim, kMostKeys)                                                                 \
  DEFINE_KERNEL(rope_attention_short_forward_##T##_##kHeadDim##_##kMostKeys, ShortForwardParams, attention_short_forward, \
                short_forward_kernel, (T, kHeadDim, kMostKeys), (ShortForwardConfig<kHeadDim, kMostKeys>), kRows,         \
                (ShortForwardConfig<kHeadDim, kMostKeys>::kBlocksPerSm))
