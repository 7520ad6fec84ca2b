// rope_attention forward for sm_80 and later (mma.sync): one block computes 128 queries of one head.
//
// Schedule of a block of four warps, 32 queries per warp:
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

template <int kHeadDimension>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kThreads = 128;
  static constexpr int kQueries = 128;
  static constexpr int kKeys = kHeadDim <= 80 ? 64 : 32;  // per tile; registers decide
  static constexpr bool kQueriesInRegisters = kHeadDim <= 72;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowBytes = kPaddedRowBytes<kHeadDim>;
  static constexpr int kQueryBytes = kQueries * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStageBytes;
};

// One warp: 32 queries, as two blocks of 16 rows.
template <typename T, int kHeadDim>
struct ForwardWarp : SoftmaxRows<T, kHeadDim, 2> {
  using Config = ForwardConfig<kHeadDim>;
  RowOperand<kHeadDim, 2, Config::kQueriesInRegisters> queries;

  __device__ ForwardWarp(uint32_t query_rows, float scale) : SoftmaxRows<T, kHeadDim, 2>(scale), queries(query_rows) {}

  // One step over 8 * kColumns keys, of which the first `exist` count when kMasked. exact: take the maximum first.
  template <int kColumns, bool kMasked>
  __device__ __forceinline__ void step(uint32_t keys, uint32_t values, bool exact, int exist) {
    Accumulator<2, kColumns> s;
    float sums[2][2];
    while (true) {
      multiply_transposed<T, kHeadDim, 2, Config::kQueriesInRegisters, kColumns>(s, queries, keys);
      if constexpr (kMasked) mask_columns<2, kColumns>(s, exist);
      if (exact) this->template raise_reference<kColumns>(s);
      if (!this->template exponentials<kColumns>(s, sums) || exact) break;
      exact = true;
    }
    this->add(sums);
    multiply_add<T, kHeadDim, 2, kColumns>(this->accumulator, s, values);
  }
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void attention_forward(const ForwardParams& params) {
  using Config = ForwardConfig<kHeadDim>;
  extern __shared__ __align__(16) char shared[];
  const Tile tile = params.tiles[blockIdx.x];
  if (tile.rows == 0) return;
  const int head = blockIdx.y, key_head = head / params.heads_per_key_head;
  const uint16_t* k = params.k + tile.other_start * params.k_stride_token + key_head * params.k_stride_head;
  const uint16_t* v = params.v + tile.other_start * params.v_stride_token + key_head * params.v_stride_head;

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
    return reinterpret_cast<uint16_t*>(shared + row * Config::kRowBytes) + channel;
  });

  const int first = threadIdx.x / 32 * 32;  // this warp's first row in the tile
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
        for (int at = 0; at < exist; at += 16) {
          warp.template step<2, true>(stage + at * Config::kRowBytes, stage + Config::kTileBytes + at * Config::kRowBytes,
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

#define INSTANTIATE_FORWARD(T, kHeadDim)                                                                                   \
  extern "C" __global__ void __launch_bounds__(comp_kernels::ForwardConfig<kHeadDim>::kThreads, 2)                         \
      rope_attention_forward_##T##_##kHeadDim(const __grid_constant__ comp_kernels::ForwardParams params) {                \
    comp_kernels::attention_forward<comp_kernels::T, kHeadDim>(params);                                                    \
  }                                                                                                                        \
  template <>                                                                                                              \
  comp_kernels::Kernel comp_kernels::forward_kernel<comp_kernels::T, kHeadDim>() {                                         \
    using Config = ForwardConfig<kHeadDim>;                                                                                \
    return {"rope_attention_forward_" #T "_" #kHeadDim,                                                                    \
            reinterpret_cast<const void*>(rope_attention_forward_##T##_##kHeadDim), Config::kThreads,                      \
            Config::kSharedBytes, Config::kQueries};                                                                       \
  }
