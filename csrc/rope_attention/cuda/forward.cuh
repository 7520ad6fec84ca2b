// rope_attention forward for sm_80 and later (mma.sync), 16-bit and float32: one block computes 128 queries of one head, 64 where
// rows are long.
//
// Schedule of a block of four warps, 32 or 16 queries per warp:
//   1. the query tile is read once, turned and left in shared memory; its fragments stay in registers where they fit;
//   2. key and value tiles (keys were turned by the prepare kernel, once per row) stream through a ring of two buffers by
//      cp.async: tile t + 1 is under way while tile t is used, one barrier per tile;
//   3. per tile S = Q K^T stays in registers, becomes P there, and P V accumulates in registers.
#pragma once

#include "products.cuh"
#include "rope_attention.h"
#include "softmax.cuh"
#include "tile_copy.cuh"

namespace comp_kernels {

template <typename T, int kHeadDimension>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kThreads = 128;
  // Registers decide, and the 99 KiB of shared memory of sm_86, 89 and 120.
  static constexpr int kBlocks = kHeadDim <= (kFloat32<T> ? 80 : 128) ? 2 : 1;  // of 16 queries per warp
  static constexpr int kQueries = kThreads / 32 * 16 * kBlocks;
  static constexpr int kKeys = kFloat32<T> ? (kHeadDim <= 128 ? 32 : 8) : kHeadDim <= 80 ? 64 : 32;  // per tile
  static constexpr int kTailColumns = kKeys < 16 ? 1 : 2;  // of eight keys, per step of a tile that is not full
  static constexpr bool kQueriesInRegisters = kHeadDim <= 72;
  static constexpr int kChunks = kHeadDim / kChunkElements<T>;
  static constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  static constexpr int kQueryBytes = kQueries * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

// One warp: 16 * kBlocks queries.
template <typename T, int kHeadDim>
struct ForwardWarp : SoftmaxRows<T, kHeadDim, ForwardConfig<T, kHeadDim>::kBlocks> {
  using Config = ForwardConfig<T, kHeadDim>;
  static constexpr int kBlocks = Config::kBlocks;
  RowOperand<T, kHeadDim, kBlocks, Config::kQueriesInRegisters> queries;

  __device__ ForwardWarp(uint32_t query_rows, float scale) : SoftmaxRows<T, kHeadDim, kBlocks>(scale), queries(query_rows) {}

  // One step over 8 * kColumns keys, of which the first `exist` count when kMasked. exact: take the maximum first.
  template <int kColumns, bool kMasked>
  __device__ __forceinline__ void step(uint32_t keys, uint32_t values, bool exact, int exist) {
    Accumulator<kBlocks, kColumns> s;
    float sums[kBlocks][2];
    while (true) {
      multiply_transposed<T, kHeadDim, kBlocks, Config::kQueriesInRegisters, kColumns>(s, queries, keys);
      if constexpr (kMasked) mask_columns<kBlocks, kColumns>(s, exist, this->scale_log2);
      if (exact) this->template raise_reference<kColumns>(s);
      if (!this->template exponentials<kColumns>(s, sums, exact) || exact) break;
      exact = true;
    }
    this->add(sums);
    multiply_add<T, kHeadDim, kBlocks, kColumns>(this->accumulator, s, values);
  }
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void attention_forward(const ForwardParams& params) {
  using Config = ForwardConfig<T, kHeadDim>;
  extern __shared__ __align__(16) char shared[];
  const Tile tile = params.tiles[blockIdx.x];
  if (tile.rows == 0) return;
  const int head = blockIdx.y, key_head = head / params.heads_per_key_head;
  const Element<T>* k = elements<T>(params.k) + tile.other_start * params.k_stride_token + key_head * params.k_stride_head;
  const Element<T>* v = elements<T>(params.v) + tile.other_start * params.v_stride_token + key_head * params.v_stride_head;

  using Copy = TileCopy<Config::kKeys, Config::kChunks, Config::kRowBytes, Config::kThreads>;
  Copy copy_k(k, params.k_stride_token, params.head_dim), copy_v(v, params.v_stride_token, params.head_dim);
  const uint32_t ring = shared_address(shared) + Config::kQueryBytes;
  int ahead = tile.other_rows;  // keys not fetched yet
  auto fetch = [&](uint32_t stage) {
    copy_k.next(stage, ahead);
    copy_v.next(stage + Config::kTileBytes, ahead);
    copy_async_commit();
    ahead -= Config::kKeys;
  };
  fetch(ring);
  load_queries<T, Config::kQueries, kHeadDim, Config::kThreads>(params, tile, head, threadIdx.x, [&](int row, int channel) {
    return reinterpret_cast<Element<T>*>(shared + row * Config::kRowBytes) + channel;
  });

  const int first = threadIdx.x / 32 * 16 * Config::kBlocks;  // this warp's first row in the tile
  ForwardWarp<T, kHeadDim> warp(shared_address(shared) + first * Config::kRowBytes, params.scale);
  const bool idle = first >= tile.rows;     // still copies and meets the others at the barriers
  uint32_t stage = ring;
  for (int start = 0; start < tile.other_rows; start += Config::kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // the tile has come; everyone is done with the other buffer
    if (start == 0) warp.queries.hold();
    const uint32_t other = ring + ring + Config::kStageBytes - stage;
    fetch(other);
    if (!idle) {
      const int exist = tile.other_rows - start;
      if (exist >= Config::kKeys) {
        warp.template step<Config::kKeys / 8, false>(stage, stage + Config::kTileBytes, start == 0, exist);
      } else {
        constexpr int kTail = Config::kTailColumns;
        for (int at = 0; at < exist; at += 8 * kTail) {
          warp.template step<kTail, true>(stage + at * Config::kRowBytes, stage + Config::kTileBytes + at * Config::kRowBytes,
                                          start + at == 0, exist - at);
        }
      }
    }
    stage = other;
  }
  copy_async_wait<0>();
  __syncthreads();
  if (!idle) {
    warp.finish(params, shared + first * Config::kRowBytes, tile.row + first, tile.rows - first, head);
  }
}

}  // namespace comp_kernels

#define INSTANTIATE_FORWARD(T, kHeadDim)                                                                                  \
  DEFINE_KERNEL(rope_attention_forward_##T##_##kHeadDim, ForwardParams, attention_forward, forward_kernel, (T, kHeadDim), \
                (ForwardConfig<T, kHeadDim>), kQueries, 2)
