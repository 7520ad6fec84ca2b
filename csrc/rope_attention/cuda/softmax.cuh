// The rows of one warp between the two products of attention forward: softmax without a running maximum, and the output.
//
// P = exp2(S * scale * log2 e - reference), where the reference of a row is the maximum of its first tile. A later tile whose
// exponentials sum to more than kLimit in some lane is taken again, exactly: with the maximum found and what was accumulated
// scaled down. So the common tile needs neither the maximum per score, nor shuffles, nor a rescaling of the output: per
// score one fma, one ex2, one addition, half a conversion. Any reference up to 2^-12 below the maximum gives the same
// relative precision, in float32 sums as in the 16-bit P.
//
// Where the maximum is taken the scores are scaled first, rounded, and subtracted then: their maximum becomes exactly zero,
// whatever the size of the logits. The fma of the common tile does not round the product; from 1e8 on that can leave 2^12 where
// nothing should be left, and then the tile is taken again.
#pragma once

#include "products.cuh"
#include "rotate.cuh"
#include "tiles.cuh"

namespace comp_kernels {

struct ForwardParams {
  const void* q;  // [T, Hq, D]
  const void* k;  // [Tk, Hkv, D], turned; sm_90a: images of key tiles, see tile_images.cuh
  const void* v;  // [Tk, Hkv, D]; sm_90a: images
  void* out;      // [T, Hq, D] contiguous
  double* lse;    // [Hq, T]
  const Tile* tiles;
  Tables tables;  // of the queries
  int64_t q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head;  // elements
  int num_tokens, num_heads;
  int heads_per_key_head;
  int head_dim;  // multiple of 8, at most the kernel's kHeadDim
  float scale;
};

// 16 * kBlocks rows of one warp. Layout of rows and columns over lanes: products.cuh.
template <typename T, int kHeadDim, int kBlocks>
struct SoftmaxRows {
  static constexpr int kRowBytes = kPaddedRowBytes<T, kHeadDim>;
  static constexpr float kLimit = 4096.f;  // fits float16 with room to spare

  Accumulator<kBlocks, kHeadDim / 8> accumulator;
  float reference[kBlocks][2];  // [block][row lane / 4, + 8], in units of log2
  float total[kBlocks][2];      // this lane's part of the row sums
  float scale_log2;

  __device__ explicit SoftmaxRows(float scale) : scale_log2(scale * kLog2E) {
    fill<kBlocks, kHeadDim / 8>(accumulator, 0.f);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) reference[m][i] = -kInfinity, total[m][i] = 0.f;
    }
  }

  // Scale s, in place, and take the rows' maximum into account: move the reference up, scale what was accumulated down.
  template <int kColumns>
  __device__ __forceinline__ void raise_reference(Accumulator<kBlocks, kColumns>& s) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float peak = -kInfinity;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[m][n][2 * i + j];
            x = __fmul_rn(x, scale_log2);
            peak = fmaxf(peak, x);
          }
        }
        peak = fmaxf(reference[m][i], quad_max(peak));
        const float factor = peak == -kInfinity ? 1.f : exp2_approx(reference[m][i] - peak);
        reference[m][i] = peak;
        total[m][i] *= factor;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) accumulator[m][n][2 * i] *= factor, accumulator[m][n][2 * i + 1] *= factor;
      }
    }
  }

  // s -> P in place; sums gets this lane's part of the row sums. Returns whether they are so large, in some lane, that P must
  // be taken again after raise_reference. scaled: by that function.
  template <int kColumns>
  __device__ __forceinline__ bool exponentials(Accumulator<kBlocks, kColumns>& s, float (&sums)[kBlocks][2], bool scaled) {
    const float factor = scaled ? 1.f : scale_log2;
    float largest = 0.f;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[m][n][2 * i + j];
            x = exp2_approx(fmaf(x, factor, -reference[m][i]));
            sum = n + j == 0 ? x : sum + x;
          }
        }
        sums[m][i] = sum;
        largest = m + i == 0 ? sum : fmaxf(largest, sum);
      }
    }
    return !__all_sync(0xffffffffu, !(largest > kLimit));
  }

  __device__ __forceinline__ void add(const float (&sums)[kBlocks][2]) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) total[m][i] += sums[m][i];
    }
  }

  // Of a sum of weights; the fast one errs by 2^-22, which a 16-bit result does not show.
  static __device__ __forceinline__ float log2_of(float sum) {
    if constexpr (kFloat32<T>) {
      return log2f(sum);
    } else {
      return __log2f(sum);
    }
  }

  // Divide by the row sums, write out and lse of the rows that exist. `own_rows`: shared memory for these
  // rows, read by no one else, used to turn fragments into whole rows.
  __device__ void finish(const ForwardParams& params, char* own_rows, int first_row, int rows, int head) {
    constexpr int kChunks = kHeadDim / kChunkElements<T>;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = m * 16 + i * 8 + lane / 4;
        const float sum = quad_sum(total[m][i]);
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // no keys: zeros
        if (lane % 4 == 0 && row < rows) {
          params.lse[static_cast<int64_t>(head) * params.num_tokens + first_row + row] =
              sum == 0.f ? -kInfinity : (static_cast<double>(reference[m][i]) + log2_of(sum)) * kLn2Double;
        }
        Element<T>* to = reinterpret_cast<Element<T>*>(own_rows + row * kRowBytes) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          Packed<T, 2> two;
          two.set(0, accumulator[m][n][2 * i] * inverse, accumulator[m][n][2 * i + 1] * inverse);
          *reinterpret_cast<Packed<T, 2>*>(to + n * 8) = two;
        }
      }
    }
    __syncwarp();
    Element<T>* out = elements<T>(params.out) + (static_cast<int64_t>(first_row) * params.num_heads + head) * params.head_dim;
    const int chunks = params.head_dim / kChunkElements<T>;
    for (int i = lane; i < 16 * kBlocks * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      if (row < rows && chunk < chunks) {
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * params.num_heads * params.head_dim +
                                  chunk * kChunkElements<T>) =
            *reinterpret_cast<const uint4*>(own_rows + row * kRowBytes + chunk * 16);
      }
    }
  }
};

// Turn (or copy) a tile of query rows into shared memory by kThreads threads; rows and channels that do not exist become zero.
// place(row, channel): where the channel goes; the channels of 16 bytes lie side by side.
template <typename T, int kRows, int kHeadDim, int kThreads, bool kAhead = false, typename Place>
__device__ __forceinline__ void load_queries(const ForwardParams& params, const Tile& tile, int head, int thread, Place place) {
  constexpr int kChunk = kChunkElements<T>;
  const int chunks = params.head_dim / kChunk;
  const Element<T>* q = elements<T>(params.q) + head * params.q_stride_head;
  for_each_in_rows(thread, kThreads, kRows, kHeadDim / kChunk, [&](int row, int chunk) {
    if (row >= tile.rows || chunk >= chunks) {
      *reinterpret_cast<uint4*>(place(row, chunk * kChunk)) = uint4{0, 0, 0, 0};
    } else if (params.tables.cos == nullptr) {
      *reinterpret_cast<uint4*>(place(row, chunk * kChunk)) =
          *reinterpret_cast<const uint4*>(q + (tile.row + row) * params.q_stride_token + chunk * kChunk);
    }
  });
  if (params.tables.cos == nullptr) return;
  rotate_rows<T, kAhead>(thread, kThreads, kRows, params.head_dim, params.tables, [&](int index, auto turn_row) {
    // rows in the order 0 4 1 5 2 6 3 7: two rows that lie side by side in a store then differ by half the banks
    const int row = (index & ~7) | (index & 1) << 2 | (index >> 1 & 3);
    if (row >= tile.rows) return;
    const int64_t token = tile.row + row, table_row = token * params.tables.token_stride + head * params.tables.head_stride;
    turn_row([&](int channel) { return place(row, channel); }, q + token * params.q_stride_token, params.tables.cos + table_row,
             params.tables.sin + table_row);
  });
}

}  // namespace comp_kernels
