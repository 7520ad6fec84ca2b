// What runs before attention: the tile lists are made from cu_seqlens, and every row of the keys (in backward of the queries
// too) is turned once into a workspace, so that no attention block ever repeats a rotation.
#pragma once

#include "rotate.cuh"
#include "tiles.cuh"

namespace comp_kernels {

struct ListJob {
  Tile* tiles;
  const int32_t* cu_seqlens;
  const int32_t* cu_seqlens_other;
  int tokens;
  int tile;  // rows per tile
};

struct RotateJob {
  const uint16_t* x;  // [tokens, heads, head_dim]
  uint16_t* turned;   // [heads, tokens, head_dim] contiguous
  const int32_t* cu_seqlens;
  Tables tables;
  int64_t stride_token, stride_head;
  int tokens, heads;
};

struct PrepareParams {
  ListJob lists[2];
  RotateJob rotations[2];
  int num_lists, num_rotations;
  int sequences, head_dim;
};

constexpr int kPrepareThreads = 256;
constexpr int kPrepareRows = 128;  // rows per block

inline int rotate_blocks(const RotateJob& job) { return (job.tokens + kPrepareRows - 1) / kPrepareRows * job.heads; }

template <typename T>
__device__ void rotate_block(const RotateJob& job, int block, int sequences, int head_dim) {
  const int blocks_per_head = (job.tokens + kPrepareRows - 1) / kPrepareRows;
  const int head = block / blocks_per_head, first = (block - head * blocks_per_head) * kPrepareRows;
  const int rows = min(kPrepareRows, job.cu_seqlens[sequences] - first);  // the slack beyond is never read
  const uint16_t* x = job.x + head * job.stride_head + first * job.stride_token;
  uint16_t* turned = job.turned + (static_cast<int64_t>(head) * job.tokens + first) * head_dim;
  const int64_t table = static_cast<int64_t>(first) * job.tables.token_stride + head * job.tables.head_stride;
  rotate_rows<T, kPrepareThreads>(rows, head_dim, job.tables, [&](int row, auto turn_row) {
    uint16_t* to = turned + row * head_dim;
    const int64_t table_row = table + row * job.tables.token_stride;
    turn_row([&](int channel) { return to + channel; }, x + row * job.stride_token, job.tables.cos + table_row,
             job.tables.sin + table_row);
  });
}

// Grid: num_lists blocks, then rotate_blocks of every rotation.
template <typename T>
__device__ __forceinline__ void prepare(const PrepareParams& params) {
  int block = blockIdx.x;
  if (block < params.num_lists) {
    const ListJob& job = params.lists[block];
    list_tiles<kPrepareThreads>(job.tiles, job.cu_seqlens, job.cu_seqlens_other, params.sequences, job.tokens, job.tile);
    return;
  }
  block -= params.num_lists;
  int which = 0;
  const int blocks = (params.rotations[0].tokens + kPrepareRows - 1) / kPrepareRows * params.rotations[0].heads;
  if (block >= blocks) block -= blocks, which = 1;
  rotate_block<T>(params.rotations[which], block, params.sequences, params.head_dim);
}

}  // namespace comp_kernels
