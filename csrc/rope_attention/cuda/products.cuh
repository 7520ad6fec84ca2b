// The two products of attention on one warp's tile: rows times columns transposed, and weights times columns.
#pragma once

#include "operands.cuh"
#include "products_tf32.cuh"

namespace comp_kernels {

template <typename T, int kHeadDim, int kBlocks, bool kHeld>
struct RowOperand<T, kHeadDim, kBlocks, kHeld, false> {
  static constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;  // of 16 channels; eight more remain when kHeadDim is no multiple of 16
  uint32_t address;                             // this lane's, in the warp's first row
  uint32_t full[kBlocks][kHeld ? kSteps : 1][4];
  uint32_t half[kBlocks][2];

  __device__ __forceinline__ explicit RowOperand(uint32_t first_row) : address(first_row + lane_offset_of_rows<kRowBytes>()) {}

  // Call once, when the rows have come.
  __device__ __forceinline__ void hold() {
    if constexpr (kHeld) {
      unrolled<kSteps>([&](auto k) { read<k>(); });
      if constexpr (kHeadDim % 16 != 0) read_half();
    }
  }
  template <int k>
  __device__ __forceinline__ void read() {
    unrolled<kBlocks>([&](auto m) { load_matrix_x4<m * 16 * kRowBytes + k * 32>(full[m][kHeld ? k : 0], address); });
  }
  __device__ __forceinline__ void read_half() {
    unrolled<kBlocks>([&](auto m) { load_matrix_x2<m * 16 * kRowBytes + kSteps * 32>(half[m], address); });
  }
};

// c = rows columns^T over kHeadDim channels, for the 8 * kColumns columns whose rows start at `columns`.
template <typename T, int kHeadDim, int kBlocks, bool kHeld, int kColumns>
__device__ __forceinline__ void multiply_transposed(Accumulator<kBlocks, kColumns>& c,
                                                    RowOperand<T, kHeadDim, kBlocks, kHeld, false>& rows, uint32_t columns) {
  constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  const uint32_t address = columns + lane_offset_of_columns<kRowBytes>();
  unrolled<kHeadDim / 16>([&](auto k) {
    if constexpr (!kHeld) rows.template read<k>();
    unrolled<kColumns / 2>([&](auto n) {
      uint32_t b[4];
      load_matrix_x4<n * 16 * kRowBytes + k * 32>(b, address);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        const uint32_t (&a)[4] = rows.full[m][kHeld ? k : 0];
        if constexpr (k == 0) {
          mma_k16_first<T>(c[m][2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma_k16_first<T>(c[m][2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        } else {
          mma_k16<T>(c[m][2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma_k16<T>(c[m][2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
    });
  });
  if constexpr (kHeadDim % 16 != 0) {
    if constexpr (!kHeld) rows.read_half();
    unrolled<kColumns / 2>([&](auto n) {
      uint32_t b[2];
      load_matrix_x2<n * 16 * kRowBytes + kHeadDim / 16 * 32>(b, columns + lane_offset_of_half<kRowBytes>());
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        mma_k8<T>(c[m][2 * n], rows.half[m][0], rows.half[m][1], b[0]);
        mma_k8<T>(c[m][2 * n + 1], rows.half[m][0], rows.half[m][1], b[1]);
      }
    });
  }
}

// multiply_add, below, of 16-bit elements.
template <typename T, int kHeadDim, int kBlocks, int kColumns>
__device__ __forceinline__ void multiply_add_halves(Accumulator<kBlocks, kHeadDim / 8>& c,
                                                    const Accumulator<kBlocks, kColumns>& weights, uint32_t columns) {
  constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  const uint32_t address = columns + lane_offset_of_rows<kRowBytes>();
  unrolled<kColumns / 2>([&](auto k) {
    uint32_t a[kBlocks][4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&w)[4] = weights[m][2 * k + i / 2];
        a[m][i] = pack<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
      }
    }
    unrolled<kHeadDim / 16>([&](auto n) {
      uint32_t b[4];
      load_matrix_x4_transposed<k * 16 * kRowBytes + n * 32>(b, address);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        mma_k16<T>(c[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
        mma_k16<T>(c[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
      }
    });
    if constexpr (kHeadDim % 16 != 0) {
      uint32_t b[2];
      load_matrix_x2_transposed<k * 16 * kRowBytes + kHeadDim / 16 * 32>(b, columns + lane_offset_of_half<kRowBytes>());
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        mma_k16<T>(c[m][kHeadDim / 8 - 1], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
      }
    }
  });
}

// c += weights columns: the weights, rounded to T, are [16 * kBlocks, 8 * kColumns]; the columns [8 * kColumns, kHeadDim].
template <typename T, int kHeadDim, int kBlocks, int kColumns>
__device__ __forceinline__ void multiply_add(Accumulator<kBlocks, kHeadDim / 8>& c, const Accumulator<kBlocks, kColumns>& weights,
                                             uint32_t columns) {
  if constexpr (kFloat32<T>) {
    multiply_add_tf32<T, kHeadDim, kBlocks, kColumns>(c, weights, columns);
  } else {
    multiply_add_halves<T, kHeadDim, kBlocks, kColumns>(c, weights, columns);
  }
}

}  // namespace comp_kernels
