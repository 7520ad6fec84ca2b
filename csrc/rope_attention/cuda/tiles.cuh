// Packed sequences cut into tiles, on the device: no host ever reads cu_seqlens.
#pragma once

#include <stdint.h>

namespace comp_kernels {

// What a block needs to know; one 16-byte load.
struct __align__(16) Tile {
  int row;          // first row of the tile in the packed tensor
  int rows;         // rows of the tile that exist, 1..kTile; 0: nothing to do
  int other_start;  // the sequence on the other side (keys for a tile of queries): first row, or slot of its first image
  int other_rows;   // and length, possibly 0
};

// Upper bound of the number of tiles for any cu_seqlens: every sequence, and the slack after the last, ends one tile early.
__host__ __device__ inline int64_t max_tiles(int64_t tokens, int64_t sequences, int tile) { return tokens / tile + sequences + 1; }

struct ListJob {
  Tile* tiles;
  const int32_t* cu_seqlens;
  const int32_t* cu_seqlens_other;
  int tokens;
  int tile;  // rows per tile
};

// One block of kThreads threads lists the tiles of all sequences in `tiles` (max_tiles entries). The rows from
// cu_seqlens[sequences] on are one more sequence whose other side is empty: its tiles write zeros. images: keys per image
// where the other side is read as images (tile_images.cuh), else 0.
template <int kThreads>
__device__ void list_tiles(Tile* tiles, const int32_t* cu_seqlens, const int32_t* cu_seqlens_other, int sequences, int tokens,
                           int tile, int images = 0) {
  __shared__ int warp_total[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int base = 0;  // tiles of the sequences before this round
  for (int round = 0; round <= sequences; round += kThreads) {
    const int b = round + threadIdx.x;
    const bool slack = b == sequences;
    const int start = b <= sequences ? cu_seqlens[b] : 0;
    const int length = b < sequences ? cu_seqlens[b + 1] - start : slack ? tokens - start : 0;
    const int count = (length + tile - 1) / tile;
    int before = count;  // inclusive prefix sum over the warp, then over the block
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += left;
    }
    if (lane == 31) warp_total[warp] = before;
    __syncthreads();
    before += base - count;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += warp_total[w];
      base += warp_total[w];
    }
    __syncthreads();
    const bool paired = b < sequences;
    const int other_first = paired ? cu_seqlens_other[b] : 0;
    const int other_rows = paired ? cu_seqlens_other[b + 1] - other_first : 0;
    const int other_start = images > 0 && paired ? other_first / images + b : other_first;
    for (int i = 0; i < count; ++i) {
      tiles[before + i] = Tile{start + i * tile, min(tile, length - i * tile), other_start, other_rows};
    }
  }
  const int capacity = static_cast<int>(max_tiles(tokens, sequences, tile));
  for (int i = base + threadIdx.x; i < capacity; i += kThreads) tiles[i] = Tile{0, 0, 0, 0};
}

}  // namespace comp_kernels
