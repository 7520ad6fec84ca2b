// How tiles lie in shared memory, and a product's rows and columns over the lanes of a warp.
//
// Tiles lie in shared memory as rows of an odd number of 16-byte chunks, so that the eight rows of an ldmatrix matrix fall into
// different banks and all addresses in the loops are a register plus a constant.
#pragma once

#include "common/cuda/ptx.cuh"

namespace comp_kernels {

// Bytes of a shared-memory row of kHeadDim channels of T.
template <typename T, int kHeadDim>
constexpr int kPaddedRowBytes = (kHeadDim / kChunkElements<T> | 1) * 16;

// An accumulator of 16 * kBlocks rows and 8 * kColumns columns. Element [m][n][2 i + j] of a lane is row
// 16 m + 8 i + lane / 4, column 8 n + 2 (lane % 4) + j.
template <int kBlocks, int kColumns>
using Accumulator = float[kBlocks][kColumns][4];

// This lane's offset in a tile for ldmatrix of 16 rows x 16 channels: as rows of the first operand (or transposed columns)...
template <int kRowBytes>
__device__ __forceinline__ uint32_t lane_offset_of_rows() {
  const int lane = threadIdx.x % 32;
  return lane % 16 * kRowBytes + lane / 16 * 16;
}
// ... and as columns of the second operand.
template <int kRowBytes>
__device__ __forceinline__ uint32_t lane_offset_of_columns() {
  const int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
}
// 16 rows x 8 channels: two matrices, addressed by lanes 0..15.
template <int kRowBytes>
__device__ __forceinline__ uint32_t lane_offset_of_half() {
  return threadIdx.x % 16 * kRowBytes;
}

// The rows of a warp as first operands: products.cuh (16-bit) and products_tf32.cuh. kHeld: their fragments stay in registers,
// else they are read again for every product.
template <typename T, int kHeadDim, int kBlocks, bool kHeld, bool = kFloat32<T>>
struct RowOperand;

template <int kBlocks, int kColumns>
__device__ __forceinline__ void fill(Accumulator<kBlocks, kColumns>& c, float value) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = value;
    }
  }
}

// Columns from `exist` on get what becomes -infinity by the scale (not 0): they weigh nothing after exp.
template <int kBlocks, int kColumns>
__device__ __forceinline__ void mask_columns(Accumulator<kBlocks, kColumns>& c, int exist, float scale) {
  const float nothing = scale < 0.f ? kInfinity : -kInfinity;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n * 8 + threadIdx.x % 4 * 2 + i % 2 < exist) continue;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) c[m][n][i] = nothing;
    }
  }
}

}  // namespace comp_kernels
