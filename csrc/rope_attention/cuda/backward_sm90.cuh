// rope_attention backward for sm_90a: the two kernels of backward.cuh with warpgroup products fed by bulk copies.
//
// A block owns 128 rows (queries, or keys) of one head, 64 per warpgroup, and streams tiles of the columns of the other side:
//
//     rows       kept         streamed      first products                      then
//     queries    Q, dO        K, V          S = Q K^T, dP = dO V^T              dQ += dS K
//     keys       K, V         Q, dO         S^T = K Q^T, dP^T = V dO^T          dK += dS^T Q, dV += P^T dO
//
// P and dS stay in registers, where they are left operands of the second products; the right operands of both kinds are the
// same tiles, read along channels or along rows. Where registers allow the kept rows are left operands in registers as well:
// from shared memory they would cost more of its bandwidth than a product of 64 columns lasts. The second products of a
// tile run while the first ones of the next are under way; two warpgroups take turns, as in forward_sm90.cuh.
// Every output row belongs to one warp: results are equal from run to run.
#pragma once

#include "backward.cuh"
#include "prepare_sm90.cuh"
#include "wgmma.cuh"

namespace comp_kernels {

struct BackwardSm90Params {
  const uint16_t *row_one, *row_two;        // images of the side that owns the rows: q, grad_out or k, v
  const uint16_t *column_one, *column_two;  // of the other side
  const RowStats* stats;                    // [Hq, slots of the queries, kImageKeys]
  const float* low;                         // as stats; this and huge: see StatsJob
  const int* huge;                          // [Hq, slots of the queries]
  const Tile* tiles;                        // [row_slots]
  GradientParams first;                     // dQ, or dK
  GradientParams second;                    // dV when keys own the rows
  int row_slots, column_slots;
  int heads_per_key_head;
  float scale;
};

template <int kHeadDimension, bool kKeyRowsOwn>
struct BackwardSm90Config {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr bool kKeyRows = kKeyRowsOwn;
  static constexpr int kThreads = 384;
  static constexpr int kRows = kImageKeys;
  static constexpr int kBlocks = 1;  // of 16 rows per warp
  // ptxas 13.0 gives the registers of kept rows to dS in the loop at 64 channels: there they come from shared memory.
  // test_kept_rows_keep_their_registers looks for that in the machine code of all.
  static constexpr bool kHeld = kHeadDim == 72 || (!kKeyRows && kHeadDim == 80);
  static constexpr bool kOverlap = !kKeyRows || kHeadDim < 128;  // second products under the next first ones
  static constexpr int kColumns = 64;                            // per tile; divides kImageKeys
  static constexpr int kSteps = (kHeadDim + 15) / 16;
  static constexpr int kStride = kHeadDim * 16;  // to the next 8 rows of an image
  static constexpr int kTileBytes = kColumns * kHeadDim * 2;
  static constexpr int kStatsBytes = kKeyRows ? kColumns * 8 : 0;
  static constexpr int kStageBytes = 2 * kTileBytes + kStatsBytes;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kRowsBytes = kHeld ? 0 : 2 * kRows * kHeadDim * 2;
  static constexpr int kRing = kBarrierBytes + kRowsBytes;
  static constexpr int kStages = 4;
  static constexpr int kStagingFloats = kHeadDim % 16 == 8 ? kHeadDim : kHeadDim + 8;
  static constexpr int kUsedBytes = kRing + kStages * kStageBytes;
  static constexpr int kStagingBytes = kBarrierBytes + kRows * kStagingFloats * 4;
  static constexpr int kSharedBytes = kUsedBytes > kStagingBytes ? kUsedBytes : kStagingBytes;
  static_assert(kHeld || kHeadDim % 16 == 0);
};

template <typename Config>
struct BackwardRing {
  uint32_t base;
  __device__ uint32_t one(int stage) const { return base + Config::kRing + stage * Config::kStageBytes; }
  __device__ uint32_t two(int stage) const { return one(stage) + Config::kTileBytes; }
  __device__ uint32_t stats(int stage) const { return one(stage) + 2 * Config::kTileBytes; }
  __device__ uint32_t rows(int which) const { return base + Config::kBarrierBytes + which * Config::kRows * Config::kHeadDim * 2; }
  __device__ uint32_t full(int stage) const { return base + stage * 8; }
  __device__ uint32_t empty(int stage) const { return base + 32 + stage * 8; }
  __device__ uint32_t rows_full() const { return base + 64; }
};

template <typename Config>
__device__ __forceinline__ void produce_columns(const BackwardSm90Params& params, const Tile& tile, int row_head, int row_slot,
                                                int first_head, int heads) {
  constexpr int kHeadDim = Config::kHeadDim;
  extern __shared__ __align__(128) char ring_memory[];  // of another name than that of backward.cuh, which is aligned to 16
  const BackwardRing<Config> ring{shared_address(ring_memory)};
  if constexpr (!Config::kHeld) {
    const int64_t at = (static_cast<int64_t>(row_head) * params.row_slots + row_slot) * kImageKeys * kHeadDim;
    const uint32_t bytes = Config::kRows * kHeadDim * 2;
    barrier_arrive_expecting(ring.rows_full(), 2 * bytes);
    copy_bulk(ring.rows(0), params.row_one + at, bytes, ring.rows_full());
    copy_bulk(ring.rows(1), params.row_two + at, bytes, ring.rows_full());
  }
  RingPosition<Config::kStages> now;
  for (int head = first_head; head < first_head + heads; ++head) {
    const int64_t first = (static_cast<int64_t>(head) * params.column_slots + tile.other_start) * kImageKeys;
    for (int column = 0; column < tile.other_rows; column += Config::kColumns, now.advance()) {
      barrier_wait(ring.empty(now.stage), now.parity ^ 1);
      const uint32_t full = ring.full(now.stage);
      barrier_arrive_expecting(full, Config::kStageBytes);
      copy_bulk(ring.one(now.stage), params.column_one + (first + column) * kHeadDim, Config::kTileBytes, full);
      copy_bulk(ring.two(now.stage), params.column_two + (first + column) * kHeadDim, Config::kTileBytes, full);
      if (Config::kKeyRows) copy_bulk(ring.stats(now.stage), params.stats + first + column, Config::kStatsBytes, full);
    }
  }
}

// 64 kept rows of a warpgroup as left operand: fragments in registers, or a descriptor.
template <typename T, typename Config>
struct KeptRows {
  static constexpr int kHeadDim = Config::kHeadDim;
  uint32_t fragment[Config::kHeld ? Config::kSteps : 1][4];
  uint64_t descriptor;

  // image: of this warp's 16 rows. A core matrix is 32 words, one per lane. (No __ldg: in a dependent launch the kernel before may
  // have been writing them while this one had started already.)
  __device__ __forceinline__ void load(const uint16_t* image) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(image) + threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < Config::kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int chunk = 2 * k + i / 2;
        fragment[k][i] = chunk < kHeadDim / 8 ? words[(i % 2 * (kHeadDim / 8) + chunk) * 32] : 0;
      }
    }
  }

  // Start c = rows columns^T.
  template <int kCount>
  __device__ __forceinline__ void start(Accumulator<1, kCount>& c, uint32_t columns) const {
    wgmma_fence();
    const StepColumns<kHeadDim> b(columns, Config::kStride);
#pragma unroll
    for (int k = 0; k < Config::kSteps; ++k) {
      if constexpr (Config::kHeld) {
        Wgmma<T, kCount * 8>::from_registers_along(c, fragment[k], b[k], k > 0);
      } else {
        Wgmma<T, kCount * 8>::from_shared(c, advanced(descriptor, k * 256), b[k], k > 0);
      }
    }
    wgmma_commit();
  }
};

template <typename T, int kHeadDim, bool kKeyRows>
__device__ __forceinline__ void attention_backward_sm90(const BackwardSm90Params& params) {
  using Config = BackwardSm90Config<kHeadDim, kKeyRows>;
  constexpr int kCount = Config::kColumns / 8;
  extern __shared__ __align__(128) char ring_memory[];
  const int slot = blockIdx.x, row_head = blockIdx.y;
  wait_for_grid_before();
  // The kernel of the queries follows that of the keys and reads what prepare wrote, which has ended: no block comes here sooner.
  if constexpr (kKeyRows) let_next_grid_start();
  const Tile tile = params.tiles[slot];
  if (tile.rows == 0) return;
  if (tile.other_rows == 0) {
    zero_gradient_rows<T, Config::kThreads>(params.first, tile.rows, tile.row, row_head, kHeadDim);
    if (kKeyRows) zero_gradient_rows<T, Config::kThreads>(params.second, tile.rows, tile.row, row_head, kHeadDim);
    return;
  }
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for the whole warp, and the compiler knows it
  const int groups = tile.rows > 64 ? 2 : 1;
  const int shared_heads = params.heads_per_key_head;  // grouped queries: a key head sums over its query heads
  const int first_head = kKeyRows ? row_head * shared_heads : row_head / shared_heads, heads = kKeyRows ? shared_heads : 1;
  const BackwardRing<Config> ring{shared_address(ring_memory)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      barrier_init(ring.full(stage), 1);
      barrier_init(ring.empty(stage), groups * 4);  // every warp that computes
    }
    barrier_init(ring.rows_full(), 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (group == 0) {
    registers_down_to<24>();
    if (threadIdx.x == 0) produce_columns<Config>(params, tile, row_head, slot, first_head, heads);
    return;
  }
  registers_up_to<240>();
  if (group > groups) return;

  const int lane = threadIdx.x % 32, own = (threadIdx.x / 32 - 4) * 16;  // this warp's first row in the tile
  const int64_t row_image = static_cast<int64_t>(row_head) * params.row_slots + slot;
  KeptRows<T, Config> one, two;
  if constexpr (Config::kHeld) {
    const int64_t at = (row_image * kImageKeys + own) * kHeadDim;
    one.load(params.row_one + at);
    two.load(params.row_two + at);
  } else {
    one.descriptor = matrix_descriptor(ring.rows(0) + (group - 1) * 8 * Config::kStride, 128, Config::kStride);
    two.descriptor = matrix_descriptor(ring.rows(1) + (group - 1) * 8 * Config::kStride, 128, Config::kStride);
    barrier_wait(ring.rows_full(), 0);
  }
  RowStats row_stats[2] = {};
  if constexpr (!kKeyRows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) row_stats[i] = params.stats[row_image * kImageKeys + own + i * 8 + lane / 4];
  }
  const float scale_log2 = params.scale * kLog2E;
  // Whether weights are computed exactly (prepare.cuh). What has to be read for that comes while the first tile does.
  bool exact = false;
  for (int head = first_head; head < first_head + (kKeyRows ? heads : 1); ++head) {
    exact |= kKeyRows ? any_huge(params.huge + static_cast<int64_t>(head) * params.column_slots + tile.other_start, 0,
                                 tile.other_rows - 1)
                      : any_huge(params.huge + row_image, 0, 0);
  }
  Accumulator<1, kHeadDim / 8> first, second;  // second: dV, unused when queries own the rows
  fill<1, kHeadDim / 8>(first, 0.f);
  if constexpr (kKeyRows) fill<1, kHeadDim / 8>(second, 0.f);
  Accumulator<1, kCount> p, ds;

  const bool alone = groups == 1;
  const int own_turn = kFirstTurn + group - 1, other_turn = kFirstTurn + 2 - group;
  if (!alone && group == 2) named_barrier_arrive(other_turn, 256);  // the first warpgroup begins
  const int tiles = (tile.other_rows + Config::kColumns - 1) / Config::kColumns, steps = tiles * heads;
  int exist = tile.other_rows;
  RingPosition<Config::kStages> now;
  for (int step = 0; step < steps; ++step) {
    barrier_wait(ring.full(now.stage), now.parity);
    if (!alone) named_barrier_sync(own_turn, 256);
    one.template start<kCount>(p, ring.one(now.stage));
    two.template start<kCount>(ds, ring.two(now.stage));
    if (!alone && (group == 1 || step + 1 < steps)) named_barrier_arrive(other_turn, 256);
    wgmma_wait<1>();  // S, and the second products of the step before
    pin(p);
    pin(first);
    if constexpr (kKeyRows) pin(second);
    if (step > 0 && lane == 0) barrier_arrive(ring.empty(now.before().stage));
    if (!kKeyRows && exist < Config::kColumns) mask_columns<1, kCount>(p, exist, scale_log2);
    if constexpr (!kKeyRows) exist -= Config::kColumns;
    const RowStats* column_stats =
        reinterpret_cast<const RowStats*>(ring_memory + (ring.stats(now.stage) - ring.base)) + lane % 4 * 2;
    auto weigh = [&](auto exactly, const float* lows) {  // lows: of the rows, or of the columns of this tile
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        float lse[4], low[4];
        if constexpr (kKeyRows) {
          const float4 both = *reinterpret_cast<const float4*>(column_stats + n * 8);
          lse[0] = lse[2] = both.x, lse[1] = lse[3] = both.z;
          if constexpr (exactly) low[0] = low[2] = lows[n * 8 + lane % 4 * 2], low[1] = low[3] = lows[n * 8 + lane % 4 * 2 + 1];
        } else {
          lse[0] = lse[1] = row_stats[0].lse_log2, lse[2] = lse[3] = row_stats[1].lse_log2;
          if constexpr (exactly) low[0] = low[1] = lows[lane / 4], low[2] = low[3] = lows[8 + lane / 4];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = p[0][n][i];
          if constexpr (exactly) {
            x = exact_weight(x, scale_log2, lse[i], low[i]);
          } else {
            x = exp2_approx(fmaf(x, scale_log2, -lse[i]));
          }
        }
      }
    };
    if (exact) {
      const int64_t column =
          (static_cast<int64_t>(first_head + step / tiles) * params.column_slots + tile.other_start) * kImageKeys +
          step % tiles * Config::kColumns;
      weigh(Constant<1>{}, params.low + (kKeyRows ? column : row_image * kImageKeys + own));
    } else {
      weigh(Constant<0>{}, nullptr);
    }
    wgmma_wait<0>();
    pin(ds);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      float delta[4];
      if constexpr (kKeyRows) {
        const float4 both = *reinterpret_cast<const float4*>(column_stats + n * 8);
        delta[0] = delta[2] = both.y, delta[1] = delta[3] = both.w;
      } else {
        delta[0] = delta[1] = row_stats[0].delta, delta[2] = delta[3] = row_stats[1].delta;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - delta[i]);
    }
    // They depend on S, so they are written after the products that read those of the step before have been waited for.
    uint32_t packed_p[kCount / 2][4], packed_ds[kCount / 2][4];
    if constexpr (kKeyRows) pack_left<T, kCount>(packed_p, p);
    pack_left<T, kCount>(packed_ds, ds);
    wgmma_fence();
    const uint64_t along_one = matrix_descriptor(ring.one(now.stage), Config::kStride, 128);
    const uint64_t along_two = matrix_descriptor(ring.two(now.stage), Config::kStride, 128);
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      if constexpr (kKeyRows) {
        Wgmma<T, kHeadDim>::from_registers(second, packed_p[k], advanced(along_two, k * 2 * Config::kStride));
      }
      Wgmma<T, kHeadDim>::from_registers(first, packed_ds[k], advanced(along_one, k * 2 * Config::kStride));
    }
    wgmma_commit();
    if constexpr (!Config::kOverlap) {
      wgmma_wait<0>();
      pin(first);
      pin(second);
    }
    now.advance();
  }
  wgmma_wait<0>();
  pin(first);
  if constexpr (kKeyRows) pin(second);

  if (groups == 1) {
    named_barrier<1, 128>();
  } else {
    named_barrier<1, 256>();  // the staging area overlaps all buffers
  }
  if (own >= tile.rows) return;
  float* staging = reinterpret_cast<float*>(ring_memory + Config::kBarrierBytes) + own * Config::kStagingFloats;
  const int rows = min(16, tile.rows - own);
  write_gradient<T, Config>(params.first, first, params.scale, staging, rows, tile.row + own, row_head, kHeadDim);
  if constexpr (kKeyRows) {
    write_gradient<T, Config>(params.second, second, 1.f, staging, rows, tile.row + own, row_head, kHeadDim);
  }
}

}  // namespace comp_kernels

#define INSTANTIATE_BACKWARD_SM90_OF(T, kHeadDim, kKeyRows, rows)                                                    \
  DEFINE_KERNEL(rope_attention_backward_sm90_##rows##_##T##_##kHeadDim, BackwardSm90Params, attention_backward_sm90, \
                backward_sm90_kernel, (T, kHeadDim, kKeyRows), (BackwardSm90Config<kHeadDim, kKeyRows>), kRows, 1)
#define INSTANTIATE_BACKWARD_SM90(T, kHeadDim)              \
  INSTANTIATE_BACKWARD_SM90_OF(T, kHeadDim, false, queries) \
  INSTANTIATE_BACKWARD_SM90_OF(T, kHeadDim, true, keys)
