// The products of products.cuh for float32 tensors, by tensor cores that multiply TF32: 11 significant bits.
//
// tf32 rounds both factors and takes one product. tf32x3 writes x = high + low with high = x rounded, and takes
// low high + high low + high high: what is left out, low low and a bit of each low, is about 2^-23 of a product. Such sums are
// formed for a few steps of eight at a time and added to the result by an addition of their own: the units cut the sums that
// they form, and over many steps that would show.
#pragma once

#include "operands.cuh"

namespace comp_kernels {

// A factor as the units take it: they cut the lower 13 bits of what they are given.
template <typename T>
struct Tf32Factor;

template <>
struct Tf32Factor<tf32> {
  uint32_t high;
  __device__ __forceinline__ void set(float x) { asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(x)); }
};

template <>
struct Tf32Factor<tf32x3> {
  uint32_t high, low;
  __device__ __forceinline__ void set(float x) {
    // rounded by an addition: a NaN that this turns into a number is still one in `low`
    high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
  }
};

// c += a b: 16 rows, 8 columns, 8 steps.
__device__ __forceinline__ void multiply_factors(float (&c)[4], const Tf32Factor<tf32> (&a)[4], const Tf32Factor<tf32> (&b)[2]) {
  mma_tf32(c, {a[0].high, a[1].high, a[2].high, a[3].high}, {b[0].high, b[1].high});
}
__device__ __forceinline__ void multiply_factors(float (&c)[4], const Tf32Factor<tf32x3> (&a)[4],
                                                 const Tf32Factor<tf32x3> (&b)[2]) {
  mma_tf32(c, {a[0].low, a[1].low, a[2].low, a[3].low}, {b[0].high, b[1].high});
  mma_tf32(c, {a[0].high, a[1].high, a[2].high, a[3].high}, {b[0].low, b[1].low});
  mma_tf32(c, {a[0].high, a[1].high, a[2].high, a[3].high}, {b[0].high, b[1].high});
}

template <int kCount>
__device__ __forceinline__ void add_to(float (&c)[kCount], const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) c[i] += x[i];
}

// Rows are read again for every product: both their halves would fill the registers.
template <typename T, int kHeadDim, int kBlocks, bool kHeld>
struct RowOperand<T, kHeadDim, kBlocks, kHeld, true> {
  static constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  uint32_t address;  // this lane's, in the warp's first row

  __device__ __forceinline__ explicit RowOperand(uint32_t first_row) : address(first_row + lane_offset_of_rows<kRowBytes>()) {}

  __device__ __forceinline__ void hold() {}

  // Channels 8 k to 8 k + 7.
  template <int k>
  __device__ __forceinline__ void read(Tf32Factor<T> (&a)[kBlocks][4]) const {
    unrolled<kBlocks>([&](auto m) {
      uint32_t bits[4];
      load_matrix_x4<m * 16 * kRowBytes + k * 32>(bits, address);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i].set(__uint_as_float(bits[i]));
    });
  }
};

// c = rows columns^T over kHeadDim channels, for the 8 * kColumns columns whose rows start at `columns`.
template <typename T, int kHeadDim, int kBlocks, bool kHeld, int kColumns>
__device__ __forceinline__ void multiply_transposed(Accumulator<kBlocks, kColumns>& c,
                                                    const RowOperand<T, kHeadDim, kBlocks, kHeld, true>& rows, uint32_t columns) {
  constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  constexpr int kApart = 4;  // steps of eight channels that are summed apart
  const uint32_t address = columns + lane_offset_of_columns<kRowBytes>();
  unrolled<(kHeadDim / 8 + kApart - 1) / kApart>([&](auto part) {
    Accumulator<kBlocks, kColumns> sum;
    fill<kBlocks, kColumns>(sum, 0.f);
    constexpr int kFirst = part * kApart, kLast = kFirst + kApart < kHeadDim / 8 ? kFirst + kApart : kHeadDim / 8;
    unrolled<kLast, kFirst>([&](auto k) {
      Tf32Factor<T> a[kBlocks][4];
      rows.template read<k>(a);
      auto column = [&](auto n, uint32_t b0, uint32_t b1) {
        Tf32Factor<T> b[2];
        b[0].set(__uint_as_float(b0)), b[1].set(__uint_as_float(b1));
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) multiply_factors(sum[m][n], a[m], b);
      };
      unrolled<kColumns / 2>([&](auto n) {
        uint32_t b[4];
        load_matrix_x4<n * 16 * kRowBytes + k * 32>(b, address);
        column(Constant<2 * n>{}, b[0], b[1]);
        column(Constant<2 * n + 1>{}, b[2], b[3]);
      });
      if constexpr (kColumns % 2 != 0) {
        uint32_t b[2];
        load_matrix_x2<kColumns / 2 * 16 * kRowBytes + k * 32>(b, address);
        column(Constant<kColumns - 1>{}, b[0], b[1]);
      }
    });
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] = part == 0 ? sum[m][n][i] : c[m][n][i] + sum[m][n][i];
      }
    }
  });
}

// multiply_add of products.cuh. A lane holds two neighbouring columns of the weights, and a step of eight may take its columns in
// any order: so the lane's columns are its own left operand, and it reads the rows of the right operand that go with them.
template <typename T, int kHeadDim, int kBlocks, int kColumns>
__device__ __forceinline__ void multiply_add_tf32(Accumulator<kBlocks, kHeadDim / 8>& c,
                                                  const Accumulator<kBlocks, kColumns>& weights, uint32_t columns) {
  constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  const int lane = threadIdx.x % 32;
  const uint32_t address = columns + lane % 4 * 2 * kRowBytes + lane / 4 * 4;
  Tf32Factor<T> a[kColumns][kBlocks][4];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      const float (&w)[4] = weights[m][k];
      a[k][m][0].set(w[0]), a[k][m][1].set(w[2]), a[k][m][2].set(w[1]), a[k][m][3].set(w[3]);
    }
  }
  unrolled<kHeadDim / 8>([&](auto n) {
    float sum[kBlocks][4] = {};
    unrolled<kColumns>([&](auto k) {
      Tf32Factor<T> b[2];
      b[0].set(load_shared<k * 8 * kRowBytes + n * 32>(address));
      b[1].set(load_shared<(k * 8 + 1) * kRowBytes + n * 32>(address));
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) multiply_factors(sum[m], a[k][m], b);
    });
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) add_to(c[m][n], sum[m]);
  });
}

}  // namespace comp_kernels
