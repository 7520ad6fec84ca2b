// What runs before the sm_90a backward: all four operands become images of tiles (tile_images.cuh) of kImageKeys rows, q and k
// turned on the way, with the statistics of the query rows in the same order.
//
// Slot start / kImageKeys + b holds the first tile of sequence b; the rows after the last sequence count as one more sequence,
// which has no image. Rows of a tile that do not exist are zeros, and their log-sum-exp is +inf: they weigh nothing.
#pragma once

#include "prepare.cuh"
#include "tile_images.cuh"

namespace comp_kernels {

struct ImageJob {
  const uint16_t* x;  // [tokens, heads, head_dim]
  uint16_t* images;   // [heads, slots, kImageKeys, head_dim]
  Tables tables;      // cos == nullptr: copied
  int64_t stride_token, stride_head;
};

// One side of attention: two tensors over the same rows.
struct ImageSide {
  ImageJob first, second;  // q and grad_out, or k and v
  const int32_t* cu_seqlens;
  Tile* tiles;             // [slots]; other_start is a slot
  int tokens, heads, slots;
};

struct PrepareSm90Params {
  ImageSide queries, keys;
  StatsJob stats;  // stats, low: [Hq, slots, kImageKeys]; huge: [Hq, slots]
  int sequences, head_dim;
};

// The last sequence (`sequences`: the slack) that starts at or before a slot.
__device__ __forceinline__ int sequence_of_slot(const int32_t* cu_seqlens, int sequences, int slot) {
  int sequence = 0;
  for (int low = 1, high = sequences + 1; low < high;) {
    const int middle = (low + high) / 2;
    if (first_slot(cu_seqlens, middle) <= slot) {
      sequence = middle, low = middle + 1;
    } else {
      high = middle;
    }
  }
  return sequence;
}

template <typename T, typename Place>
__device__ __forceinline__ void image_of(const ImageJob& job, const Place& place, int64_t start, int rows, int head, int head_dim) {
  const uint16_t* x = job.x + start * job.stride_token + head * job.stride_head;
  const bool turned = job.tables.cos != nullptr;
  constexpr int kBatch = 4;
  uint4 chunks[kBatch];
  for_batches_in_rows<kBatch>(
      threadIdx.x, kImageThreads, turned ? 0 : rows, head_dim / 8,
      [&](int slot, int row, int chunk) { chunks[slot] = *reinterpret_cast<const uint4*>(x + row * job.stride_token + chunk * 8); },
      [&](int slot, int row, int chunk) { *reinterpret_cast<uint4*>(job.images + place(row, chunk * 8)) = chunks[slot]; });
  for_each_in_rows(threadIdx.x, kImageThreads, kImageKeys - rows, head_dim / 8, [&](int row, int chunk) {
    *reinterpret_cast<uint4*>(job.images + place(rows + row, chunk * 8)) = uint4{0, 0, 0, 0};
  });
  if (!turned) return;
  const int64_t table = start * job.tables.token_stride + head * job.tables.head_stride;
  rotate_rows<T, true>(threadIdx.x, kImageThreads, rows, head_dim, job.tables, [&](int row, auto turn_row) {
    const int64_t table_row = table + static_cast<int64_t>(row) * job.tables.token_stride;
    turn_row([&](int channel) { return job.images + place(row, channel); }, x + row * job.stride_token, job.tables.cos + table_row,
             job.tables.sin + table_row);
  });
}

// grad_out to its image, and from the same loads delta. tile: of all heads.
template <typename T, typename Place>
__device__ __forceinline__ void image_with_stats(const StatsJob& job, const ImageJob& image, int64_t tile, const Place& place,
                                                 int64_t start, int rows, int head, int head_dim) {
  constexpr int kLanes = 8;  // per row
  const int lane = threadIdx.x % kLanes;
  bool huge = false;
#pragma unroll 2
  for (int row = threadIdx.x / kLanes; row < kImageKeys; row += kImageThreads / kLanes) {
    const int64_t token = start + row;
    float delta = 0.f;
    for (int c = lane * 8; c < head_dim; c += kLanes * 8) {
      Packed<T, 8> g{};
      if (row < rows) {
        g = *reinterpret_cast<const Packed<T, 8>*>(elements<T>(job.grad_out) + token * job.stride_token + head * job.stride_head +
                                                   c);
        const Packed<T, 8> o =
            *reinterpret_cast<const Packed<T, 8>*>(elements<T>(job.out) + (token * job.heads + head) * head_dim + c);
        add_product<T>(delta, o, g);
      }
      *reinterpret_cast<Packed<T, 8>*>(image.images + place(row, c)) = g;
    }
    delta = octet_sum(delta);
    if (lane == 0) {
      const int64_t at = static_cast<int64_t>(head) * job.tokens + token;
      RowStats stats{kInfinity, 0.f};
      float low = 0.f;
      if (row < rows) {
        if (job.grad_lse != nullptr) delta -= static_cast<float>(job.grad_lse[at]);
        stats = row_stats(job.lse[at], delta, low);
        huge |= fabsf(stats.lse_log2) > kHugeLog2;
      }
      job.stats[tile * kImageKeys + row] = stats;
      job.low[tile * kImageKeys + row] = low;
    }
  }
  huge = __syncthreads_or(huge);
  if (threadIdx.x == 0) job.huge[tile] = huge;
}

// Grid: first tensor and second tensor of every slot and head of the queries, then of the keys.
template <typename T>
__device__ __forceinline__ void prepare_sm90(const PrepareSm90Params& params) {
  let_next_grid_start();
  const int of_queries = 2 * params.queries.slots * params.queries.heads;
  const bool queries = static_cast<int>(blockIdx.x) < of_queries;
  const ImageSide& side = queries ? params.queries : params.keys;
  const ImageSide& other = queries ? params.keys : params.queries;
  int block = static_cast<int>(blockIdx.x) - (queries ? 0 : of_queries);
  const bool second = block >= side.slots * side.heads;
  if (second) block -= side.slots * side.heads;
  const int head = block / side.slots, slot = block - head * side.slots;

  const int sequence = sequence_of_slot(side.cu_seqlens, params.sequences, slot);
  const bool slack = sequence == params.sequences;
  const int begin = side.cu_seqlens[sequence], end = slack ? side.tokens : side.cu_seqlens[sequence + 1];
  const int start = begin + (slot - first_slot(side.cu_seqlens, sequence)) * kImageKeys;
  const int rows = max(0, min(kImageKeys, end - start));
  if (second && head == 0 && threadIdx.x == 0) {
    Tile tile{start, rows, 0, 0};
    if (!slack) {
      tile.other_start = first_slot(other.cu_seqlens, sequence);
      tile.other_rows = other.cu_seqlens[sequence + 1] - other.cu_seqlens[sequence];
    }
    side.tiles[slot] = tile;
  }
  if (rows == 0 || slack) return;

  const int head_dim = params.head_dim;
  const int64_t tile_of_all = static_cast<int64_t>(head) * side.slots + slot;
  auto place = [&](int row, int channel) {
    return tile_of_all * kImageKeys * head_dim + ((row >> 3) * (head_dim >> 3) + (channel >> 3)) * 64 + (row & 7) * 8 +
           (channel & 7);
  };
  if (queries && second) {
    image_with_stats<T>(params.stats, side.second, tile_of_all, place, start, rows, head, head_dim);
  } else {
    image_of<T>(second ? side.second : side.first, place, start, rows, head, head_dim);
  }
}

}  // namespace comp_kernels

#define INSTANTIATE_PREPARE_SM90(T)                                                                         \
  DEFINE_KERNEL(rope_attention_prepare_sm90_##T, PrepareSm90Params, prepare_sm90, prepare_sm90_kernel, (T), \
                (FixedBlock<kImageThreads, kImageKeys>), kRows, 2)
