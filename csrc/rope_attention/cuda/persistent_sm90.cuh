// rope_attention forward for sm_90a with a grid that stays: as many blocks as there are multiprocessors walk over all tiles of
// queries, those with most keys first. What comes before and after the steps of forward_sm90.cuh then lies under steps: while
// a tile is computed, the producer brings the next queries and their first keys, and one warpgroup writes while others compute.
//
// For that the queries have to come by bulk copies, as images turned beforehand, like the keys: 4 D bytes per query and head more
// to write and read, and no rotation in this kernel. Off unless asked for: it has not run on a GPU.
#pragma once

#include "forward_sm90.cuh"
#include "prepare_sm90.cuh"

namespace comp_kernels {

struct __align__(16) LongestFirstTile {
  Tile tile;
  int image;      // of its first query: row of the images
  int first_key;  // in the packed tensor
  int unused[2];
};

struct PersistentPrepareParams {
  ImageJob q, k, v;  // v.images == nullptr: values stay where they are
  LongestFirstTile* tiles;  // [max_tiles]
  const int32_t *cu_seqlens, *cu_seqlens_k;
  int tokens, heads, heads_k, slots, slots_k;
  int sequences, head_dim;
  int tile_rows;
};

struct PersistentParams {
  ForwardParams attention;  // q, k, v: images; tiles: null
  const LongestFirstTile* tiles;
  int num_tiles;
  bool values_in_place;  // attention.v is no image but the tensor
};

// One block lists the tiles of all sequences by the number of their keys, in steps of 64, the most first; the slack, and tiles
// that do not exist, come last. Equal ones stand in any order: no result depends on it.
__device__ __forceinline__ void list_longest_first(const PersistentPrepareParams& params) {
  constexpr int kBuckets = kImageThreads;
  __shared__ int next[kBuckets];  // first the number of tiles, then where the next one goes
  auto of_sequence = [&](int b, auto visit) {
    const bool slack = b == params.sequences;
    const int start = params.cu_seqlens[b], end = slack ? params.tokens : params.cu_seqlens[b + 1];
    const int keys = slack ? 0 : params.cu_seqlens_k[b + 1] - params.cu_seqlens_k[b];
    const int bucket = kBuckets - 1 - min((keys + 63) / 64, kBuckets - 1);
    visit(start, end - start, keys, (end - start + params.tile_rows - 1) / params.tile_rows, bucket);
  };
  next[threadIdx.x] = 0;
  __syncthreads();
  for (int b = threadIdx.x; b <= params.sequences; b += kImageThreads) {
    of_sequence(b, [&](int, int, int, int count, int bucket) { atomicAdd(next + bucket, count); });
  }
  __syncthreads();
  const int own = next[threadIdx.x];
  for (int step = 1; step < kBuckets; step *= 2) {
    const int left = static_cast<int>(threadIdx.x) >= step ? next[threadIdx.x - step] : 0;
    __syncthreads();
    next[threadIdx.x] += left;
    __syncthreads();
  }
  const int total = next[kBuckets - 1];
  __syncthreads();
  next[threadIdx.x] -= own;
  __syncthreads();
  for (int b = threadIdx.x; b <= params.sequences; b += kImageThreads) {
    of_sequence(b, [&](int start, int rows, int keys, int count, int bucket) {
      const int at = atomicAdd(next + bucket, count);
      const bool slack = b == params.sequences;
      for (int i = 0; i < count; ++i) {
        const int row = i * params.tile_rows;
        params.tiles[at + i] = {
            {start + row, min(params.tile_rows, rows - row), slack ? 0 : first_slot(params.cu_seqlens_k, b), keys},
            first_slot(params.cu_seqlens, b) * kImageKeys + row,
            slack ? 0 : params.cu_seqlens_k[b],
            {}};
      }
    });
  }
  const int capacity = static_cast<int>(max_tiles(params.tokens, params.sequences, params.tile_rows));
  for (int i = total + threadIdx.x; i < capacity; i += kImageThreads) params.tiles[i] = LongestFirstTile{};
}

// Grid: the list, then every slot and head of q, of k, of v.
template <typename T>
__device__ __forceinline__ void prepare_persistent(const PersistentPrepareParams& params) {
  let_next_grid_start();
  int block = static_cast<int>(blockIdx.x) - 1;
  if (block < 0) return list_longest_first(params);
  const int of_queries = params.slots * params.heads, of_keys = params.slots_k * params.heads_k;
  const bool queries = block < of_queries;
  if (!queries) block -= of_queries;
  const bool values = !queries && block >= of_keys;
  if (values) block -= of_keys;
  const int slots = queries ? params.slots : params.slots_k;
  const int32_t* cu_seqlens = queries ? params.cu_seqlens : params.cu_seqlens_k;
  const int head = block / slots, slot = block - head * slots;
  const int sequence = sequence_of_slot(cu_seqlens, params.sequences, slot);
  if (sequence == params.sequences) return;  // the slack has no images
  const int start = cu_seqlens[sequence] + (slot - first_slot(cu_seqlens, sequence)) * kImageKeys;
  const int rows = min(kImageKeys, cu_seqlens[sequence + 1] - start);
  if (rows <= 0) return;
  const int head_dim = params.head_dim;
  const int64_t image = (static_cast<int64_t>(head) * slots + slot) * kImageKeys * head_dim;
  auto place = [&](int row, int channel) {
    return image + ((row >> 3) * (head_dim >> 3) + (channel >> 3)) * 64 + (row & 7) * 8 + (channel & 7);
  };
  image_of<T>(queries ? params.q : values ? params.v : params.k, place, start, rows, head, head_dim);
}

template <int kHeadDimension>
struct PersistentConfig : ForwardSm90Config<kHeadDimension> {
  using Base = ForwardSm90Config<kHeadDimension>;
  // Query images as bulk copies leave them: core matrices side by side. Behind those of eight rows one more: zeros where the
  // last step of 16 channels has only eight, and room, so that the 16 rows of a warp hold its output on its way out.
  static constexpr int kQueryLeading = 128;
  static constexpr int kQueryStride = (kHeadDimension / 8 + 1) * 128;
  static constexpr int kQueryBytes = Base::kQueries / 8 * kQueryStride;
  static constexpr int kRing = Base::kBarrierBytes + 2 * kQueryBytes;
  static constexpr int kFit = (Base::kMaxSharedBytes - kRing) / (2 * Base::kTileBytes);
  static constexpr int kStages = kFit < 5 ? kFit : 5;
  static constexpr int kSharedBytes = kRing + kStages * 2 * Base::kTileBytes;
  static_assert(kStages >= 2 && 2 * kQueryStride >= 16 * kPaddedRowBytes<bf16, kHeadDimension>);
};

// The two query buffers, taken in turn.
template <typename Config>
struct QueryBuffers {
  uint32_t base;
  int turn = 0;

  __device__ int number() const { return turn & 1; }
  __device__ int parity() const { return turn >> 1 & 1; }
  __device__ int offset() const { return Config::kBarrierBytes + number() * Config::kQueryBytes; }
  __device__ uint32_t full() const { return base + 96 + number() * 8; }
  __device__ uint32_t empty() const { return base + Config::kBarrierBytes / 2 + 96 + number() * 8; }
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void attention_forward_persistent(const PersistentParams& all) {
  using Config = PersistentConfig<kHeadDim>;
  using R = Ring<Config>;
  const ForwardParams& params = all.attention;
  extern __shared__ __align__(128) char ring_memory[];
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const R ring{shared_address(ring_memory)};
  QueryBuffers<Config> buffers{ring.base};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      for (const auto half : {R::kKeys, R::kValues}) {
        barrier_init(ring.full(stage, half), half == R::kValues && all.values_in_place ? kValueWarps : 1);
        barrier_init(ring.empty(stage, half), Config::kGroups * 4);  // every consumer warp
      }
    }
    for (int i = 0; i < 2; ++i, ++buffers.turn) barrier_init(buffers.full(), 1), barrier_init(buffers.empty(), Config::kGroups * 4);
    buffers.turn = 0;
    fence_barrier_init();
  }
  for (int i = threadIdx.x * 16; i < 2 * Config::kQueryBytes; i += Config::kThreads * 16) {
    *reinterpret_cast<uint4*>(ring_memory + Config::kBarrierBytes + i) = uint4{0, 0, 0, 0};
  }
  fence_async_proxy();  // of the thread that wrote ...
  __syncthreads();
  fence_async_proxy();  // ... and of the one that lets wgmma read what others wrote
  wait_for_grid_before();  // for the list and all images
  const int items = all.num_tiles * params.num_heads, step = static_cast<int>(gridDim.x);

  if (group == 0) {
    registers_down_to<Config::kProducerRegisters>();
    if (threadIdx.x >= 32 && all.values_in_place) {
      ValueCopies<Config> copies{ring};
      for (int item = blockIdx.x; item < items; item += step) {
        const LongestFirstTile& next = all.tiles[item / params.num_heads];
        if (next.tile.rows == 0) break;
        copies.copy(params, next.first_key, next.tile.other_rows, item % params.num_heads / params.heads_per_key_head);
      }
      copies.finish();
    }
    if (threadIdx.x != 0) return;
    RingPosition<Config::kStages> position;
    for (int item = blockIdx.x; item < items; item += step, ++buffers.turn) {
      const LongestFirstTile& next = all.tiles[item / params.num_heads];
      const Tile tile = next.tile;
      if (tile.rows == 0) break;  // no more follow
      const int head = item % params.num_heads;
      barrier_wait(buffers.empty(), buffers.parity() ^ 1);
      if (tile.other_rows == 0) {
        barrier_arrive(buffers.full());
        continue;
      }
      const int eights = (tile.rows + 7) / 8;
      barrier_arrive_expecting(buffers.full(), eights * kHeadDim * 16);
      const uint16_t* from = elements<T>(params.q) + head * params.q_stride_head + static_cast<int64_t>(next.image) * kHeadDim;
      for (int i = 0; i < eights; ++i) {
        copy_bulk(ring.base + buffers.offset() + i * Config::kQueryStride, from + i * 8 * kHeadDim, kHeadDim * 16, buffers.full());
      }
      produce<Config>(params, tile, head / params.heads_per_key_head, !all.values_in_place, position);
    }
    return;
  }

  registers_up_to<Config::kConsumerRegisters>();
  const int first = (threadIdx.x - 128) / 32 * 16;  // this warp's first row in a tile
  char* own;  // this warp's queries, later its output
  RingPosition<Config::kStages> position;
  for (int item = blockIdx.x; item < items; item += step, ++buffers.turn) {
    const int rows = all.tiles[item / params.num_heads].tile.rows, keys = all.tiles[item / params.num_heads].tile.other_rows;
    if (rows == 0) break;
    const int groups = (rows + 63) / 64;  // warpgroups that have queries
    barrier_wait(buffers.full(), buffers.parity());
    if constexpr (kHeadDim % 16 != 0) fence_async_proxy();  // zeros that other warps wrote
    {
      ConsumerWarp<T, Config> warp(ring.base, buffers.offset(), group - 1, groups, params.scale);
      warp.now = position;
      if (group <= groups) {
        warp.consume(keys);
        if (keys > 0) warp.release(warp.now.stage, R::kValues);  // of the last step
      } else {
        warp.let_pass(keys);
      }
      position = warp.now;
      own = ring_memory + buffers.offset() + first / 8 * Config::kQueryStride;
      if (keys > 0) position.advance();
      named_barrier_sync(kFirstTurn + Config::kGroups + group, 128);  // no one of the warpgroup reads its queries any more
      const Tile tile = all.tiles[item / params.num_heads].tile;  // again: registers are short during the steps
      if (first < tile.rows) warp.finish(params, own, tile.row + first, tile.rows - first, item % params.num_heads);
    }
    if constexpr (kHeadDim % 16 != 0) {
      __syncwarp();
      const int lane = threadIdx.x % 32;
      if (lane < 16) {
        *reinterpret_cast<uint4*>(own + lane / 8 * Config::kQueryStride + kHeadDim * 16 + lane % 8 * 16) = uint4{0, 0, 0, 0};
      }
    }
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(buffers.empty());
  }
}

}  // namespace comp_kernels

#define INSTANTIATE_PERSISTENT(T, kHeadDim)                                                                      \
  DEFINE_KERNEL(rope_attention_persistent_sm90_##T##_##kHeadDim, PersistentParams, attention_forward_persistent, \
                persistent_sm90_kernel, (T, kHeadDim), (PersistentConfig<kHeadDim>), kQueries, 1)
#define INSTANTIATE_PREPARE_PERSISTENT(T)                                                                                      \
  DEFINE_KERNEL(rope_attention_prepare_persistent_##T, PersistentPrepareParams, prepare_persistent, prepare_persistent_kernel, \
                (T), (FixedBlock<kImageThreads, kImageKeys>), kRows, 2)
