// rope_attention forward for sm_80 and later (mma.sync): one block computes 128 queries of one head.
//
// Schedule of a block of four warps, 32 queries per warp:
//   1. the query tile is read once, turned and left in shared memory; its fragments stay in registers where they fit;
//   2. key and value tiles (keys were turned by the prepare kernel, once per row) stream through a ring of two buffers by
//      cp.async: tile t + 1 is under way while tile t is used, one barrier per tile;
//   3. per tile S = Q K^T stays in registers, becomes P there, and P V accumulates in registers.
//
// Softmax without a running maximum: P = exp2(S * scale * log2 e - reference), where the reference of a row is the maximum of
// its first tile. A later tile whose exponentials sum to more than kLimit in some lane is recomputed with the maximum
// taken anew. So the common tile needs neither the maximum per score, nor shuffles, nor a rescaling of the output:
// per score one fma, one ex2, one addition, half a conversion. Any reference up to 2^-12 below the maximum gives the same
// relative precision, in float32 sums as in the 16-bit P.
#pragma once

#include "products.cuh"
#include "rope_attention.h"
#include "rotate.cuh"
#include "tile_copy.cuh"
#include "tiles.cuh"

namespace comp_kernels {

struct ForwardParams {
  const uint16_t* q;  // [T, Hq, D]
  const uint16_t* k;  // [Tk, Hkv, D], turned
  const uint16_t* v;  // [Tk, Hkv, D]
  uint16_t* out;      // [T, Hq, D] contiguous
  float* lse;         // [Hq, T]
  const Tile* tiles;
  Tables tables;  // of the queries
  int64_t q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head;  // elements
  int num_tokens, num_heads;
  int heads_per_key_head;
  int head_dim;  // multiple of 8, at most the kernel's kHeadDim
  float scale;
};

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

// The state of one warp: 32 queries, as two blocks of 16 rows. Layout of rows and columns over lanes: products.cuh.
template <typename T, int kHeadDim>
struct ForwardWarp {
  using Config = ForwardConfig<kHeadDim>;
  static constexpr int kRowBytes = Config::kRowBytes;
  static constexpr float kLimit = 4096.f;  // fits float16 with room to spare

  Accumulator<2, kHeadDim / 8> accumulator;
  float reference[2][2];  // [block][row lane / 4, + 8], in units of log2
  float total[2][2];      // this lane's part of the row sums
  RowOperand<kHeadDim, 2, Config::kQueriesInRegisters> queries;
  float scale_log2;

  __device__ ForwardWarp(uint32_t query_rows, float scale) : queries(query_rows), scale_log2(scale * kLog2E) {
    fill<2, kHeadDim / 8>(accumulator, 0.f);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) reference[m][i] = -kInfinity, total[m][i] = 0.f;
    }
  }

  // Take the rows' maximum into account: move the reference up, scale what was accumulated down.
  template <int kKeys>
  __device__ __forceinline__ void raise_reference(const Accumulator<2, kKeys / 8>& s) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float peak = -kInfinity;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          peak = fmaxf(peak, fmaxf(s[m][n][2 * i] * scale_log2, s[m][n][2 * i + 1] * scale_log2));
        }
        peak = fmaxf(reference[m][i], quad_max(peak));
        const float factor = peak == -kInfinity ? 1.f : exp2_approx(reference[m][i] - peak);
        reference[m][i] = peak;
        total[m][i] *= factor;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) accumulator[m][n][2 * i] *= factor, accumulator[m][n][2 * i + 1] *= factor;
      }
    }
  }

  // s -> P in place; returns the largest of this lane's row sums and adds them to sums.
  template <int kKeys>
  __device__ __forceinline__ float exponentials(Accumulator<2, kKeys / 8>& s, float (&sums)[2][2]) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[m][n][2 * i + j];
            x = exp2_approx(fmaf(x, scale_log2, -reference[m][i]));
            sum = n + j == 0 ? x : sum + x;
          }
        }
        sums[m][i] = sum;
      }
    }
    return fmaxf(fmaxf(sums[0][0], sums[0][1]), fmaxf(sums[1][0], sums[1][1]));
  }

  // One step over kKeys keys, of which the first `exist` count when kMasked. exact: take the maximum first.
  template <int kKeys, bool kMasked>
  __device__ __forceinline__ void step(uint32_t keys, uint32_t values, bool exact, int exist) {
    Accumulator<2, kKeys / 8> s;
    float sums[2][2];
    while (true) {
      multiply_transposed<T, kHeadDim, 2, Config::kQueriesInRegisters, kKeys / 8>(s, queries, keys);
      if constexpr (kMasked) mask_columns<2, kKeys / 8>(s, exist);
      if (exact) raise_reference<kKeys>(s);
      const float largest = exponentials<kKeys>(s, sums);
      if (exact || __all_sync(0xffffffffu, !(largest > kLimit))) break;
      exact = true;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) total[m][i] += sums[m][i];
    }
    multiply_add<T, kHeadDim, 2, kKeys / 8>(accumulator, s, values);
  }

  // Divide by the row sums, write out and lse of the rows that exist. `own_rows`: this warp's 32 rows of the query tile,
  // read by no one else, used to turn fragments into whole rows.
  __device__ void finish(const ForwardParams& params, char* own_rows, int first_row, int rows, int head) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = m * 16 + i * 8 + lane / 4;
        const float sum = quad_sum(total[m][i]);
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // no keys: zeros
        if (lane % 4 == 0 && row < rows) {
          params.lse[static_cast<int64_t>(head) * params.num_tokens + first_row + row] =
              sum == 0.f ? -kInfinity : (reference[m][i] + __log2f(sum)) * kLn2;
        }
        char* shared = own_rows + row * kRowBytes + lane % 4 * 4;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          *reinterpret_cast<uint32_t*>(shared + n * 16) =
              pack<T>(accumulator[m][n][2 * i] * inverse, accumulator[m][n][2 * i + 1] * inverse);
        }
      }
    }
    __syncwarp();
    uint16_t* out = params.out + (static_cast<int64_t>(first_row) * params.num_heads + head) * params.head_dim;
    const int chunks = params.head_dim / 8;
    for (int i = lane; i < 32 * Config::kChunks; i += 32) {
      const int row = i / Config::kChunks, chunk = i % Config::kChunks;
      if (row < rows && chunk < chunks) {
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * params.num_heads * params.head_dim + chunk * 8) =
            *reinterpret_cast<const uint4*>(own_rows + row * kRowBytes + chunk * 16);
      }
    }
  }
};

// Turn (or copy) the query rows of the tile into shared memory; rows and channels that do not exist become zero.
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_queries(const ForwardParams& params, char* shared, const Tile& tile, int head) {
  using Config = ForwardConfig<kHeadDim>;
  const int chunks = params.head_dim / 8;
  for_each_in_rows(threadIdx.x, Config::kThreads, Config::kQueries, Config::kChunks, [&](int row, int chunk) {
    if (row >= tile.rows || chunk >= chunks) {
      *reinterpret_cast<uint4*>(shared + row * Config::kRowBytes + chunk * 16) = uint4{0, 0, 0, 0};
    } else if (params.tables.cos == nullptr) {
      *reinterpret_cast<uint4*>(shared + row * Config::kRowBytes + chunk * 16) = *reinterpret_cast<const uint4*>(
          params.q + (tile.row + row) * params.q_stride_token + head * params.q_stride_head + chunk * 8);
    }
  });
  if (params.tables.cos == nullptr) return;
  rotate_rows<T, Config::kThreads>(Config::kQueries, params.head_dim, params.tables, [&](int index, auto turn_row) {
    // rows in the order 0 4 1 5 2 6 3 7: two rows that lie side by side in a store then differ by half the banks
    const int row = (index & ~7) | (index & 1) << 2 | (index >> 1 & 3);
    if (row >= tile.rows) return;
    const int64_t token = tile.row + row, table_row = token * params.tables.token_stride + head * params.tables.head_stride;
    uint16_t* to = reinterpret_cast<uint16_t*>(shared + row * Config::kRowBytes);
    turn_row([&](int channel) { return to + channel; }, params.q + token * params.q_stride_token + head * params.q_stride_head,
             params.tables.cos + table_row, params.tables.sin + table_row);
  });
}

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
  load_queries<T, kHeadDim>(params, shared, tile, head);

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
        warp.template step<Config::kKeys, false>(stage, stage + Config::kTileBytes, start == 0, exist);
      } else {
        for (int at = 0; at < exist; at += 16) {
          warp.template step<16, true>(stage + at * Config::kRowBytes, stage + Config::kTileBytes + at * Config::kRowBytes,
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
