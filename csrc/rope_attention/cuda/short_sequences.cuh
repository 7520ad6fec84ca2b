// What the kernels for short sequences share: which rows a block owns, without a list made beforehand, and rows on their way
// into shared memory.
#pragma once

#include "products.cuh"
#include "rotate.cuh"

namespace comp_kernels {

// Up to kRows rows of one sequence. sequence == sequences: rows behind the last one. rows <= 0: nothing to do.
struct Piece {
  int sequence, row, rows;
  int index;   // 0: the sequence begins here
  int length;  // of the whole sequence
};

// Blocks that find_piece needs: one per sequence and one for the slack, then one per further piece of long ones.
__host__ __device__ inline int64_t short_blocks(int64_t tokens, int64_t sequences, int rows) {
  return sequences + 1 + tokens / rows;
}

// The piece of block blockIdx.x. Block b <= sequences: the first rows of sequence b. Behind them, sequence b has its pieces
// 1, 2, ... from place cu_seqlens[b] / kRows on: a sequence of n rows has (n - 1) / kRows of them, so places never meet.
template <int kRows>
__device__ __forceinline__ Piece find_piece(const int32_t* cu_seqlens, int sequences, int tokens) {
  int b = blockIdx.x, index = 0;
  if (b > sequences) {
    const int place = b - sequences - 1;
    int low = 0, high = sequences + 1;  // the last b with cu_seqlens[b] / kRows <= place lies in low..high-1
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (cu_seqlens[middle] / kRows <= place) {
        low = middle;
      } else {
        high = middle;
      }
    }
    b = low;
    index = place - cu_seqlens[b] / kRows + 1;
  }
  const int start = cu_seqlens[b], length = (b < sequences ? cu_seqlens[b + 1] : tokens) - start;
  return {b, start + index * kRows, min(kRows, length - index * kRows), index, length};
}

// The rows of one head of a packed tensor.
struct Rows {
  const uint16_t* data;
  int64_t stride;  // between tokens
};

// Start copying `rows` rows from `token` on to shared address `to` by cp.async, zeros behind them up to a multiple of
// Config::kPadding.
template <typename T, typename Config, int kThreads = Config::kThreads>
__device__ __forceinline__ void copy_rows(const Rows& x, uint32_t to, int token, int rows, int thread = threadIdx.x) {
  constexpr int kChunks = Config::kHeadDim / 8;
  const uint16_t* from = x.data + token * x.stride;
#pragma unroll 1
  for (int i = thread; i < (rows + Config::kPadding - 1) / Config::kPadding * Config::kPadding * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool exists = row < rows;
    copy_async_16<0>(to + row * Config::kRowBytes + chunk * 16, exists ? from + row * x.stride + chunk * 8 : x.data,
                     exists ? 16 : 0);
  }
}

// The same, turned on the way; without tables as copy_rows, to be waited for. kPairs: one pair of channels at a time, where
// registers are short.
template <typename T, typename Config, int kThreads, bool kPairs>
__device__ __forceinline__ void turn_rows(const Rows& x, char* to, int token, int rows, int head, const Tables& tables,
                                          int thread) {
  if (tables.cos == nullptr) {
    copy_rows<T, Config, kThreads>(x, shared_address(to), token, rows, thread);
    return;
  }
  constexpr int kChunks = Config::kHeadDim / 8;
  const int padded = (rows + Config::kPadding - 1) / Config::kPadding * Config::kPadding;
#pragma unroll 1
  for (int i = rows * kChunks + thread; i < padded * kChunks; i += kThreads) {
    *reinterpret_cast<uint4*>(to + i / kChunks * Config::kRowBytes + i % kChunks * 16) = uint4{0, 0, 0, 0};
  }
  const uint16_t* from = x.data + token * x.stride;
  const int64_t table = static_cast<int64_t>(token) * tables.token_stride + head * tables.head_stride;
  auto with_row = [&](int index, auto turn_row) {
    // rows in the order 0 4 1 5 2 6 3 7: two rows that lie side by side in a store then differ by half the banks
    const int row = (index & ~7) | (index & 1) << 2 | (index >> 1 & 3);
    if (row >= rows) return;
    const int64_t table_row = table + static_cast<int64_t>(row) * tables.token_stride;
    turn_row([&](int channel) { return reinterpret_cast<uint16_t*>(to + row * Config::kRowBytes) + channel; },
             from + row * x.stride, tables.cos + table_row, tables.sin + table_row);
  };
  if constexpr (kPairs) {
    rotate_rows_as<T, Pairing::kGeneric, false>(thread, kThreads, padded, Config::kHeadDim, tables, with_row);
  } else {
    rotate_rows<T>(thread, kThreads, padded, Config::kHeadDim, tables, with_row);
  }
}

}  // namespace comp_kernels
