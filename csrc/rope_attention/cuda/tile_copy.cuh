// Streams the tiles of one packed tensor into shared memory by cp.async, one tile of kRows rows after the other.
#pragma once

#include "common/cuda/ptx.cuh"

namespace comp_kernels {

// A thread copies one column of 16-byte chunks: rows r, r + kStride, ... of every tile, along one moving pointer. Threads
// beyond a multiple of kChunks are idle (2 of 128 at head size 72).
template <int kRows, int kChunks, int kRowBytes, int kThreads>
class TileCopy {
  static constexpr int kStride = kThreads / kChunks;
  static constexpr int kCopies = (kRows + kStride - 1) / kStride;
  static constexpr bool kAllThreads = kThreads % kChunks == 0;

  const char* source;  // this thread's next chunk
  int64_t row_bytes;   // in global memory
  bool exists;         // the column lies within head_dim

  static __device__ __forceinline__ int row() { return threadIdx.x / kChunks; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kChunks; }

  template <bool kAllRows>
  __device__ __forceinline__ void issue(uint32_t tile, int rows) {
    if (!kAllThreads && row() >= kStride) return;
    const uint32_t slot = tile + row() * kRowBytes + chunk() * 16;
    unrolled<kCopies>([&](auto i) {
      constexpr bool kEnds = (i + 1) * kStride > kRows;  // the last round may leave the tile
      if (kEnds && row() + i * kStride >= kRows) return;
      const bool read = exists && (kAllRows || row() + i * kStride < rows);
      copy_async_16<i * kStride * kRowBytes>(slot, source + i * kStride * row_bytes, read ? 16 : 0);
    });
    source += kRows * row_bytes;
  }

 public:
  // first_row: of elements of any size; strides and head_dim count elements.
  template <typename E>
  __device__ TileCopy(const E* first_row, int64_t stride_token, int head_dim)
      : source(reinterpret_cast<const char*>(first_row + row() * stride_token) + chunk() * 16),
        row_bytes(stride_token * static_cast<int>(sizeof(E))),
        exists(chunk() * 16 < head_dim * static_cast<int>(sizeof(E))) {}

  // Start copying the next tile to shared address `tile`; `rows` are left in the sequence, what is missing becomes zero.
  __device__ __forceinline__ void next(uint32_t tile, int rows) {
    if (rows >= kRows) {
      issue<true>(tile, rows);
    } else if (rows > 0) {
      issue<false>(tile, rows);
    }
  }
};

}  // namespace comp_kernels
