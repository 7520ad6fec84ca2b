// The rotary rule on rows of 16-bit elements: y = x * cos + swap(x) * sin over the first rotary_dim channels, in float32,
// rounded once. Rows are cut into units; one thread turns one unit, so that rows of any size spread over a block.
#pragma once

#include "ptx.cuh"

namespace comp_kernels {

// One pair of tables as a kernel needs it; cos == nullptr: no rotation.
struct Tables {
  const float* cos;  // [tokens, width], or [tokens, heads, width]
  const float* sin;
  int token_stride;  // floats between the rows of two tokens
  int head_stride;   // floats between the rows of two heads; 0: one table for all heads
  int rotary_dim;
  int pair_stride;
  int width;  // rotary_dim, or rotary_dim / 2: one value per pair
};

// How the channels of a row pair up decides the access width; a block finds out once.
enum class Pairing {
  kHalf8,        // pair_stride a multiple of 8: a unit is 8 channels and their 8 partners
  kHalf4,        // pair_stride a multiple of 4 (head size 72: 36): 4 channels and their 4 partners
  kInterleaved,  // pair_stride 1: 8 neighbouring channels
  kGeneric,      // anything else: one pair
};

__device__ __forceinline__ Pairing pairing_of(const Tables& tables) {
  if (tables.pair_stride % 8 == 0) return Pairing::kHalf8;
  if (tables.pair_stride % 4 == 0) return Pairing::kHalf4;
  if (tables.pair_stride == 1 && tables.rotary_dim % 8 == 0) return Pairing::kInterleaved;
  return Pairing::kGeneric;
}

template <Pairing kPairing>
constexpr int kUnitChannels = kPairing == Pairing::kHalf8 ? 16 : kPairing == Pairing::kGeneric ? 2 : 8;

// kCount consecutive 16-bit elements as packed words, moved in one access.
template <int kCount>
struct __align__(2 * kCount) Packed {
  uint32_t word[kCount / 2];
};

template <int kCount>
__device__ __forceinline__ void load_floats(float (&x)[kCount], const float* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 value = __ldg(reinterpret_cast<const float4*>(from + i));
    x[i] = value.x, x[i + 1] = value.y, x[i + 2] = value.z, x[i + 3] = value.w;
  }
}

// (first, second) -> (first * cos1 - second * sin1, second * cos2 + first * sin2)
__device__ __forceinline__ void turn(float& first, float& second, float cos1, float sin1, float cos2, float sin2) {
  const float x = first;
  first = x * cos1 - second * sin1;
  second = second * cos2 + x * sin2;
}

// kVec channels of `from` starting at `first`, and their partners `stride` further on, to the same channels of the row
// that `to(channel)` addresses.
template <typename T, int kVec, typename To>
__device__ __forceinline__ void turn_halves(To to, const uint16_t* from, const float* cos, const float* sin, int first,
                                            int stride, int table_first, int table_second) {
  Packed<kVec> a = *reinterpret_cast<const Packed<kVec>*>(from + first);
  Packed<kVec> b = *reinterpret_cast<const Packed<kVec>*>(from + first + stride);
  float cos1[kVec], sin1[kVec], cos2[kVec], sin2[kVec];
  load_floats(cos1, cos + table_first);
  load_floats(sin1, sin + table_first);
  load_floats(cos2, cos + table_second);
  load_floats(sin2, sin + table_second);
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    float a0, a1, b0, b1;
    unpack<T>(a.word[i], a0, a1);
    unpack<T>(b.word[i], b0, b1);
    turn(a0, b0, cos1[2 * i], sin1[2 * i], cos2[2 * i], sin2[2 * i]);
    turn(a1, b1, cos1[2 * i + 1], sin1[2 * i + 1], cos2[2 * i + 1], sin2[2 * i + 1]);
    a.word[i] = pack<T>(a0, a1);
    b.word[i] = pack<T>(b0, b1);
  }
  *reinterpret_cast<Packed<kVec>*>(to(first)) = a;
  *reinterpret_cast<Packed<kVec>*>(to(first + stride)) = b;
}

template <typename T, typename To>
__device__ __forceinline__ void turn_neighbours(To to, const uint16_t* from, const float* cos, const float* sin, int first,
                                                bool half_width) {
  Packed<8> x = *reinterpret_cast<const Packed<8>*>(from + first);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int one = half_width ? first / 2 + i : first + 2 * i;
    const int two = half_width ? one : one + 1;
    float a, b;
    unpack<T>(x.word[i], a, b);
    turn(a, b, __ldg(cos + one), __ldg(sin + one), __ldg(cos + two), __ldg(sin + two));
    x.word[i] = pack<T>(a, b);
  }
  *reinterpret_cast<Packed<8>*>(to(first)) = x;
}

template <typename T>
__device__ __forceinline__ float to_float(uint16_t bits) {
  float low, high;
  unpack<T>(bits, low, high);
  return low;
}

// Turn unit `unit` of one row. from: the row; to(channel): where a channel of the result goes (even channels keep the
// alignment that the access needs); cos, sin: this token's (and head's) row of the tables.
template <typename T, Pairing kPairing, typename To>
__device__ __forceinline__ void rotate_unit(To to, const uint16_t* from, const float* cos, const float* sin,
                                            const Tables& tables, int unit) {
  const bool half_width = tables.width != tables.rotary_dim;
  if constexpr (kPairing == Pairing::kInterleaved) {
    turn_neighbours<T>(to, from, cos, sin, unit * 8, half_width);
  } else {
    constexpr int kVec = kUnitChannels<kPairing> / 2;
    const int stride = tables.pair_stride;
    const int block = 2 * stride == tables.rotary_dim ? 0 : unit * kVec / stride;  // blocks of 2 * stride channels
    const int first = unit * kVec + block * stride;
    const int table_first = half_width ? unit * kVec : first;
    const int table_second = half_width ? table_first : first + stride;
    if constexpr (kPairing == Pairing::kGeneric) {
      float a = to_float<T>(from[first]), b = to_float<T>(from[first + stride]);
      turn(a, b, __ldg(cos + table_first), __ldg(sin + table_first), __ldg(cos + table_second), __ldg(sin + table_second));
      const uint32_t packed = pack<T>(a, b);
      *to(first) = static_cast<uint16_t>(packed);
      *to(first + stride) = static_cast<uint16_t>(packed >> 16);
    } else {
      turn_halves<T, kVec>(to, from, cos, sin, first, stride, table_first, table_second);
    }
  }
}

// Call visit(row, item) for all rows and items 0..items-1 of each row, spread over `threads` threads.
template <typename Visit>
__device__ __forceinline__ void for_each_in_rows(int thread, int threads, int rows, int items, Visit visit) {
  if (items == 0) return;
  const int row_step = threads / items, item_step = threads - row_step * items;  // no division inside the loop
  int row = thread / items, item = thread - row * items;
  while (row < rows) {
    visit(row, item);
    row += row_step;
    item += item_step;
    if (item >= items) item -= items, ++row;
  }
}

// Rows 0..rows-1 of a tile, turned by `threads` threads. with_row(row, turn) calls turn(to, from, cos, sin) unless the row is
// to be left out; the channels that do not turn are copied.
template <typename T, Pairing kPairing, typename WithRow>
__device__ __forceinline__ void rotate_rows_as(int thread, int threads, int rows, int head_dim, const Tables& tables,
                                               WithRow with_row) {
  for_each_in_rows(thread, threads, rows, tables.rotary_dim / kUnitChannels<kPairing>, [&](int row, int unit) {
    with_row(row, [&](auto to, const uint16_t* from, const float* cos, const float* sin) {
      rotate_unit<T, kPairing>(to, from, cos, sin, tables, unit);
    });
  });
  for_each_in_rows(thread, threads, rows, (head_dim - tables.rotary_dim) / 2, [&](int row, int word) {
    with_row(row, [&](auto to, const uint16_t* from, const float*, const float*) {
      const int channel = tables.rotary_dim + 2 * word;
      *reinterpret_cast<uint32_t*>(to(channel)) = *reinterpret_cast<const uint32_t*>(from + channel);
    });
  });
}

template <typename T, typename WithRow>
__device__ __forceinline__ void rotate_rows(int thread, int threads, int rows, int head_dim, const Tables& tables,
                                            WithRow with_row) {
  switch (pairing_of(tables)) {
    case Pairing::kHalf8:
      return rotate_rows_as<T, Pairing::kHalf8>(thread, threads, rows, head_dim, tables, with_row);
    case Pairing::kHalf4:
      return rotate_rows_as<T, Pairing::kHalf4>(thread, threads, rows, head_dim, tables, with_row);
    case Pairing::kInterleaved:
      return rotate_rows_as<T, Pairing::kInterleaved>(thread, threads, rows, head_dim, tables, with_row);
    case Pairing::kGeneric:
      return rotate_rows_as<T, Pairing::kGeneric>(thread, threads, rows, head_dim, tables, with_row);
  }
}

}  // namespace comp_kernels
