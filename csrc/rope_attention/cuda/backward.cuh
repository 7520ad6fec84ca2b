// rope_attention backward for sm_80 and later, without atomics: one kernel per output side, each output row is owned by one
// warp, so results are equal from run to run.
//
//     P = exp2(S scale log2 e - lse)    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO
//
// Both kernels are one template. A warp owns *rows* (queries, or keys) and streams the *columns* of the other side:
//
//     rows       kept         streamed      first products              then
//     queries    Q, dO        K, V          S = Q K^T, dP = dO V^T      dQ += dS K
//     keys       K, V         Q, dO         S = K Q^T, dP = V dO^T      dK += dS Q, dV += P dO
//
// P and dS never leave registers: the accumulator of the first product has the layout of the left operand of the second.
// That costs seven products where a single kernel with atomics needs five, and buys determinism without a float32 copy of dQ
// in global memory. Q and K were turned by the prepare kernel; the gradients are turned back (transposed) on the way out.
// Beyond 128 channels the registers do not hold dK and dV together: two kernels make one each, eight products in all.
#pragma once

#include "prepare.cuh"
#include "products.cuh"
#include "rope_attention.h"
#include "rotate_gradient.cuh"
#include "tile_copy.cuh"

namespace comp_kernels {

// A packed tensor as the streaming side reads it.
struct Operand {
  const void* data;  // [tokens, heads, head_dim]
  int64_t stride_token, stride_head;
};

struct BackwardParams {
  Operand q, k, v, grad_out;  // q and k turned
  const RowStats* stats;      // [Hq, T]
  const float* low;           // [Hq, T]; this and huge: see StatsJob
  const int* huge;            // [Hq, huge_blocks]
  const Tile* tiles;          // of the side that owns the rows
  GradientParams first;       // dQ, or dK
  GradientParams second;      // dV when keys own the rows
  int num_tokens;             // T
  int huge_blocks;
  int heads_per_key_head;
  int head_dim;
  float scale;
};

template <typename Element, int kHeadDimension, Gradients kGradientsMade>
struct BackwardConfig {
  using T = Element;
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr Gradients kGradients = kGradientsMade;
  static constexpr bool kKeyRows = kGradients != Gradients::kQueries;
  static constexpr bool kFirst = kGradients != Gradients::kValues;  // dQ or dK
  static constexpr bool kSecond = kGradients == Gradients::kValues || kGradients == Gradients::kKeysAndValues;
  static constexpr bool kWide = kHeadDim > kSharedKeysHeadDim;
  // Registers decide, and the 99 KiB of shared memory of sm_86, 89 and 120.
  static constexpr int kWarps = kFloat32<T> && kWide ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kHeadDim <= 80 && !kFloat32<T> ? 2 : 1;  // of 16 rows per warp
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kFloatColumns = kHeadDim <= 64 ? 32 : kHeadDim <= 128 ? 16 : 8;
  static constexpr int kHalfColumns = kWide || (kKeyRows && kBlocks == 2 && kHeadDim > 64) ? 16 : 32;
  static constexpr int kColumns = kFloat32<T> ? kFloatColumns : kHalfColumns;  // per tile
  static constexpr int kTailColumns = kColumns < 16 ? 1 : 2;  // of eight columns, per step of a tile that is not full
  static constexpr bool kRowsHeld = !kKeyRows && kHeadDim <= 64;         // in registers
  static constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  static constexpr int kRowsBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kColumns * kRowBytes;
  // Statistics of the columns: behind the tiles, or, where every byte counts, in the padding of the rows of the first one.
  static constexpr bool kStatsInRows = kFloat32<T> || kWide;
  static constexpr int kStatsStride = kStatsInRows ? kRowBytes : 8;
  static constexpr int kStatsAt = kStatsInRows ? kHeadDim * static_cast<int>(sizeof(comp_kernels::Element<T>)) : 2 * kTileBytes;
  static constexpr int kStageBytes = 2 * kTileBytes + (kKeyRows && !kStatsInRows ? kColumns * 8 : 0);
  static_assert(!kStatsInRows || kStatsAt + 16 <= kRowBytes);
  // A row of gradients on the way out: an odd multiple of 8 floats, so that fragments are written without bank conflicts.
  static constexpr int kStagingFloats = kHeadDim % 16 == 8 ? kHeadDim : kHeadDim + 8;
  static constexpr int kStagingBytes = kRows * kStagingFloats * 4;
  static constexpr int kUsedBytes = 2 * kRowsBytes + 2 * kStageBytes;
  static constexpr int kSharedBytes = kUsedBytes > kStagingBytes ? kUsedBytes : kStagingBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

// Scaled gradients of one warp's rows: registers -> its own part of shared memory -> turned back -> global.
template <typename T, typename Config>
__device__ __forceinline__ void write_gradient(const GradientParams& params,
                                               const Accumulator<Config::kBlocks, Config::kHeadDim / 8>& gradient, float scale,
                                               float* staging, int rows, int64_t token, int head, int head_dim) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Config::kBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* row = staging + (m * 16 + i * 8 + lane / 4) * Config::kStagingFloats + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Config::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(row + n * 8) = float2{gradient[m][n][2 * i] * scale, gradient[m][n][2 * i + 1] * scale};
      }
    }
  }
  __syncwarp();
  rotate_gradient_rows<T>(params, staging, Config::kStagingFloats, rows, token, head, head_dim);
}

template <typename T, int kHeadDim, Gradients kGradients>
__device__ __forceinline__ void attention_backward(const BackwardParams& params) {
  using Config = BackwardConfig<T, kHeadDim, kGradients>;
  constexpr bool kKeyRows = Config::kKeyRows;
  constexpr int kBlocks = Config::kBlocks, kChunks = kHeadDim / kChunkElements<T>, kColumns = Config::kColumns;
  extern __shared__ __align__(16) char shared[];
  const Tile tile = params.tiles[blockIdx.x];
  if (tile.rows == 0) return;
  const int row_head = blockIdx.y;
  if (tile.other_rows == 0) {
    if (Config::kFirst) zero_gradient_rows<T, Config::kThreads>(params.first, tile.rows, tile.row, row_head, params.head_dim);
    if (Config::kSecond) zero_gradient_rows<T, Config::kThreads>(params.second, tile.rows, tile.row, row_head, params.head_dim);
    return;
  }

  const int group = params.heads_per_key_head;
  const Operand& rows_one = kKeyRows ? params.k : params.q;
  const Operand& rows_two = kKeyRows ? params.v : params.grad_out;
  const Operand& columns_one = kKeyRows ? params.q : params.k;
  const Operand& columns_two = kKeyRows ? params.grad_out : params.v;
  const int column_head = kKeyRows ? row_head * group : row_head / group;
  const int column_heads = kKeyRows ? group : 1;  // grouped queries: a key head sums over its query heads

  const uint32_t base = shared_address(shared), ring = base + 2 * Config::kRowsBytes;
  auto at = [](const Operand& x, int token, int head) {
    return elements<T>(x.data) + token * x.stride_token + head * x.stride_head;
  };
  {
    using RowCopy = TileCopy<Config::kRows, kChunks, Config::kRowBytes, Config::kThreads>;
    RowCopy(at(rows_one, tile.row, row_head), rows_one.stride_token, params.head_dim).next(base, tile.rows);
    if constexpr (Config::kFirst) {
      RowCopy(at(rows_two, tile.row, row_head), rows_two.stride_token, params.head_dim).next(base + Config::kRowsBytes, tile.rows);
    }
  }

  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * Config::kWarpRows;  // this warp's first row in the tile
  const bool idle = own >= tile.rows;
  RowOperand<T, kHeadDim, kBlocks, Config::kRowsHeld> one(base + own * Config::kRowBytes);
  RowOperand<T, kHeadDim, kBlocks, Config::kRowsHeld> two(base + Config::kRowsBytes + own * Config::kRowBytes);
  Accumulator<kBlocks, kHeadDim / 8> first, second;  // second: dV; either may be unused
  fill<kBlocks, kHeadDim / 8>(first, 0.f);
  fill<kBlocks, kHeadDim / 8>(second, 0.f);
  const float scale_log2 = params.scale * kLog2E;

  // Whether weights are computed exactly (prepare.cuh): float32 has no bits to lose, 16 bits only where logits are huge.
  bool exact = kFloat32<T>;
  if constexpr (!kFloat32<T>) {
    for (int h = column_head; h < column_head + column_heads; ++h) {
      const int* huge = params.huge + static_cast<int64_t>(kKeyRows ? h : row_head) * params.huge_blocks;
      const int begin = kKeyRows ? tile.other_start : tile.row;
      exact |= any_huge(huge, begin, begin + (kKeyRows ? tile.other_rows : tile.rows) - 1);
    }
  }
  RowStats row_stats[kBlocks][2] = {};  // queries own the rows: theirs
  const float* row_low[kBlocks][2];
  if constexpr (!kKeyRows) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = own + m * 16 + i * 8 + lane / 4;
        const int64_t of_all = static_cast<int64_t>(row_head) * params.num_tokens + tile.row + min(row, tile.rows - 1);
        row_low[m][i] = params.low + of_all;
        if (row < tile.rows) row_stats[m][i] = params.stats[of_all];
      }
    }
  }

  // One step over 8 * kCount columns, from column `from` of a sequence's head h on; `exist` of them count when kMasked.
  auto step = [&](auto count, auto masked, uint32_t tile_one, uint32_t tile_two, const char* column_stats, int h, int from,
                  int exist) {
    constexpr int kCount = count;
    Accumulator<kBlocks, kCount> p;
    [[maybe_unused]] Accumulator<kBlocks, kCount> ds;
    multiply_transposed<T, kHeadDim, kBlocks, Config::kRowsHeld, kCount>(p, one, tile_one);
    if constexpr (Config::kFirst) multiply_transposed<T, kHeadDim, kBlocks, Config::kRowsHeld, kCount>(ds, two, tile_two);
    if constexpr (masked) mask_columns<kBlocks, kCount>(p, exist, scale_log2);
    auto weigh = [&](auto exactly) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        RowStats pair[2];
        float pair_low[2];
        if constexpr (kKeyRows) {
          const int column = n * 8 + lane % 4 * 2;
          if constexpr (Config::kStatsInRows) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const char* all = column_stats + (column + j) * Config::kStatsStride;
              pair[j] = *reinterpret_cast<const RowStats*>(all);
              if constexpr (exactly) pair_low[j] = *reinterpret_cast<const float*>(all + 8);
            }
          } else {
            const float4 both = *reinterpret_cast<const float4*>(column_stats + column * Config::kStatsStride);
            pair[0] = RowStats{both.x, both.y}, pair[1] = RowStats{both.z, both.w};
            if constexpr (exactly) {
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const int token = tile.other_start + min(from + column + j, tile.other_rows - 1);
                pair_low[j] = params.low[static_cast<int64_t>(h) * params.num_tokens + token];
              }
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const RowStats stats = kKeyRows ? pair[i % 2] : row_stats[m][i / 2];
            float& x = p[m][n][i];
            if constexpr (exactly) {
              x = exact_weight(x, scale_log2, stats.lse_log2, kKeyRows ? pair_low[i % 2] : __ldg(row_low[m][i / 2]));
            } else {
              x = exp2_approx(fmaf(x, scale_log2, -stats.lse_log2));
            }
            if constexpr (Config::kFirst) ds[m][n][i] = x * (ds[m][n][i] - stats.delta);
          }
        }
      }
    };
    if (exact) {
      weigh(Constant<1>{});
    } else if constexpr (!kFloat32<T>) {
      weigh(Constant<0>{});
    }
    if constexpr (Config::kSecond) multiply_add<T, kHeadDim, kBlocks, kCount>(second, p, tile_two);
    if constexpr (Config::kFirst) multiply_add<T, kHeadDim, kBlocks, kCount>(first, ds, tile_one);
  };

  for (int h = column_head; h < column_head + column_heads; ++h) {
    using ColumnCopy = TileCopy<kColumns, kChunks, Config::kRowBytes, Config::kThreads>;
    ColumnCopy copy_one(at(columns_one, tile.other_start, h), columns_one.stride_token, params.head_dim);
    ColumnCopy copy_two(at(columns_two, tile.other_start, h), columns_two.stride_token, params.head_dim);
    const int64_t of_all = static_cast<int64_t>(h) * params.num_tokens + tile.other_start + threadIdx.x;
    const RowStats* stats = params.stats + of_all;
    const float* low = params.low + of_all;
    int ahead = tile.other_rows;
    auto fetch = [&](uint32_t stage) {
      copy_one.next(stage, ahead);
      copy_two.next(stage + Config::kTileBytes, ahead);
      if (kKeyRows && ahead > 0 && threadIdx.x < kColumns) {
        const bool exists = static_cast<int>(threadIdx.x) < ahead;
        const uint32_t to = stage + Config::kStatsAt + threadIdx.x * Config::kStatsStride;
        copy_async_8(to, exists ? stats : params.stats, exists ? 8 : 0);
        if (Config::kStatsInRows) copy_async_4(to + 8, exists ? low : params.low, exists ? 4 : 0);
        stats += kColumns, low += kColumns;
      }
      copy_async_commit();
      ahead -= kColumns;
    };
    uint32_t stage = ring;
    if (h > column_head) __syncthreads();  // everyone is done with the last head's tiles
    fetch(stage);
    for (int start = 0; start < tile.other_rows; start += kColumns) {
      copy_async_wait<0>();
      __syncthreads();  // the tile has come; everyone is done with the other buffer
      if (h == column_head && start == 0) {
        one.hold();
        if constexpr (Config::kFirst) two.hold();
      }
      const uint32_t other = ring + ring + Config::kStageBytes - stage;
      fetch(other);
      if (!idle) {
        const int exist = tile.other_rows - start;
        const char* column_stats = shared + (stage - base) + Config::kStatsAt;
        if (exist >= kColumns) {
          step(Constant<kColumns / 8>{}, Constant<0>{}, stage, stage + Config::kTileBytes, column_stats, h, start, exist);
        } else {
          constexpr int kTail = Config::kTailColumns;
          for (int from = 0; from < exist; from += 8 * kTail) {
            step(Constant<kTail>{}, Constant<1>{}, stage + from * Config::kRowBytes,
                 stage + Config::kTileBytes + from * Config::kRowBytes, column_stats + from * Config::kStatsStride, h, start + from,
                 exist - from);
          }
        }
      }
      stage = other;
    }
    copy_async_wait<0>();
  }

  __syncthreads();  // the staging area overlaps all buffers
  if (idle) return;
  float* staging = reinterpret_cast<float*>(shared) + own * Config::kStagingFloats;
  const int rows = min(Config::kWarpRows, tile.rows - own);
  if constexpr (Config::kFirst) {
    write_gradient<T, Config>(params.first, first, params.scale, staging, rows, tile.row + own, row_head, params.head_dim);
  }
  if constexpr (Config::kSecond) {
    write_gradient<T, Config>(params.second, second, 1.f, staging, rows, tile.row + own, row_head, params.head_dim);
  }
}

}  // namespace comp_kernels

#define INSTANTIATE_BACKWARD_OF(T, kHeadDim, gradients, name)                                                           \
  DEFINE_KERNEL(rope_attention_backward_##name##_##T##_##kHeadDim, BackwardParams, attention_backward, backward_kernel, \
                (T, kHeadDim, gradients), (BackwardConfig<T, kHeadDim, gradients>), kRows, 2)
#if HEAD_DIM <= 128  // kSharedKeysHeadDim
#define INSTANTIATE_BACKWARD(T, kHeadDim)                            \
  INSTANTIATE_BACKWARD_OF(T, kHeadDim, Gradients::kQueries, queries) \
  INSTANTIATE_BACKWARD_OF(T, kHeadDim, Gradients::kKeysAndValues, keys)
#else
#define INSTANTIATE_BACKWARD(T, kHeadDim)                            \
  INSTANTIATE_BACKWARD_OF(T, kHeadDim, Gradients::kQueries, queries) \
  INSTANTIATE_BACKWARD_OF(T, kHeadDim, Gradients::kKeys, keys)       \
  INSTANTIATE_BACKWARD_OF(T, kHeadDim, Gradients::kValues, values)
#endif
