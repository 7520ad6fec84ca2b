// The rotary rule on rows: y = x * cos + swap(x) * sin over the first rotary_dim channels, in float32,
// rounded once. Rows are cut into units; one thread turns one unit, so that rows of any size spread over a block.
#pragma once

#include "common/cuda/ptx.cuh"

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
constexpr int kUnitChannels = kPairing == Pairing::kHalf8     ? 16
                              : kPairing == Pairing::kGeneric ? 2
                                                              : 8;

// kCount consecutive elements as words, moved in one access of 16 bytes or less, or several.
template <typename T, int kCount>
struct __align__(sizeof(Element<T>) * kCount < 16 ? sizeof(Element<T>) * kCount : 16) Packed {
  static constexpr int kWords = static_cast<int>(sizeof(Element<T>)) * kCount / 4;
  uint32_t word[kWords];

  // Elements 2 i and 2 i + 1.
  __device__ __forceinline__ void get(int i, float& one, float& two) const {
    if constexpr (kFloat32<T>) {
      one = __uint_as_float(word[2 * i]), two = __uint_as_float(word[2 * i + 1]);
    } else {
      unpack<T>(word[i], one, two);
    }
  }
  __device__ __forceinline__ void set(int i, float one, float two) {
    if constexpr (kFloat32<T>) {
      word[2 * i] = __float_as_uint(one), word[2 * i + 1] = __float_as_uint(two);
    } else {
      word[i] = pack<T>(one, two);
    }
  }
};

// sum += a . b
template <typename T, int kCount>
__device__ __forceinline__ void add_product(float& sum, const Packed<T, kCount>& a, const Packed<T, kCount>& b) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    float a0, a1, b0, b1;
    a.get(i, a0, a1);
    b.get(i, b0, b1);
    sum += a0 * b0 + a1 * b1;
  }
}

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

template <typename T>
__device__ __forceinline__ float to_float(Element<T> element) {
  if constexpr (kFloat32<T>) {
    return element;
  } else {
    float low, high;
    unpack<T>(element, low, high);
    return low;
  }
}

// Two elements that need not lie side by side.
template <typename T>
__device__ __forceinline__ void store_two(Element<T>* one, Element<T>* two, float first, float second) {
  if constexpr (kFloat32<T>) {
    *one = first, *two = second;
  } else {
    const uint32_t packed = pack<T>(first, second);
    *one = static_cast<uint16_t>(packed);
    *two = static_cast<uint16_t>(packed >> 16);
  }
}

// One unit of a row between its loads and its store, so that a thread can have the loads of several units under way.
template <typename T, Pairing kPairing>
struct RotaryUnit {
  static constexpr bool kNeighbours = kPairing == Pairing::kInterleaved;
  static constexpr int kVec = kNeighbours ? 4 : kUnitChannels<kPairing> / 2;  // pairs
  Element<T> first_one, second_one;  // of kGeneric
  Packed<T, (kVec < 4 ? 4 : kVec)> a, b;  // the first and second channels of the pairs; neighbours: 4 channels each
  float cos1[kVec], sin1[kVec], cos2[kVec], sin2[kVec];
  int first;

  // from: the row; cos, sin: this token's (and head's) row of the tables.
  __device__ __forceinline__ void load(const Element<T>* from, const float* cos, const float* sin, const Tables& tables, int unit) {
    const bool half_width = tables.width != tables.rotary_dim;
    if constexpr (kNeighbours) {
      first = unit * 8;
      const Packed<T, 8> x = *reinterpret_cast<const Packed<T, 8>*>(from + first);
      constexpr int kHalf = Packed<T, 4>::kWords;
#pragma unroll
      for (int w = 0; w < kHalf; ++w) a.word[w] = x.word[w], b.word[w] = x.word[kHalf + w];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int one = half_width ? first / 2 + i : first + 2 * i, two = half_width ? one : one + 1;
        cos1[i] = __ldg(cos + one), sin1[i] = __ldg(sin + one);
        cos2[i] = __ldg(cos + two), sin2[i] = __ldg(sin + two);
      }
    } else {
      const int stride = tables.pair_stride;
      const int block = 2 * stride == tables.rotary_dim ? 0 : unit * kVec / stride;  // blocks of 2 * stride channels
      first = unit * kVec + block * stride;
      const int table_first = half_width ? unit * kVec : first;
      const int table_second = half_width ? table_first : first + stride;
      if constexpr (kPairing == Pairing::kGeneric) {
        first_one = from[first], second_one = from[first + stride];
        cos1[0] = __ldg(cos + table_first), sin1[0] = __ldg(sin + table_first);
        cos2[0] = __ldg(cos + table_second), sin2[0] = __ldg(sin + table_second);
      } else {
        a = *reinterpret_cast<const Packed<T, kVec>*>(from + first);
        b = *reinterpret_cast<const Packed<T, kVec>*>(from + first + stride);
        load_floats(cos1, cos + table_first);
        load_floats(sin1, sin + table_first);
        load_floats(cos2, cos + table_second);
        load_floats(sin2, sin + table_second);
      }
    }
  }

  // to(channel): where a channel of the result goes (even channels keep the alignment that the access needs).
  template <typename To>
  __device__ __forceinline__ void store(To to, int stride) {
    if constexpr (kNeighbours) {
      constexpr int kHalf = Packed<T, 4>::kWords;
      Packed<T, 8> x;
#pragma unroll
      for (int w = 0; w < kHalf; ++w) x.word[w] = a.word[w], x.word[kHalf + w] = b.word[w];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float one, two;
        x.get(i, one, two);
        turn(one, two, cos1[i], sin1[i], cos2[i], sin2[i]);
        x.set(i, one, two);
      }
      *reinterpret_cast<Packed<T, 8>*>(to(first)) = x;
    } else if constexpr (kPairing == Pairing::kGeneric) {
      float one = to_float<T>(first_one), two = to_float<T>(second_one);
      turn(one, two, cos1[0], sin1[0], cos2[0], sin2[0]);
      store_two<T>(to(first), to(first + stride), one, two);
    } else {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        float a0, a1, b0, b1;
        a.get(i, a0, a1);
        b.get(i, b0, b1);
        turn(a0, b0, cos1[2 * i], sin1[2 * i], cos2[2 * i], sin2[2 * i]);
        turn(a1, b1, cos1[2 * i + 1], sin1[2 * i + 1], cos2[2 * i + 1], sin2[2 * i + 1]);
        a.set(i, a0, a1);
        b.set(i, b0, b1);
      }
      *reinterpret_cast<Packed<T, kVec>*>(to(first)) = a;
      *reinterpret_cast<Packed<T, kVec>*>(to(first + stride)) = b;
    }
  }
};

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

// The same in batches: load(slot, row, item) of kBatch items, then store(slot, row, item) of those.
template <int kBatch, typename Load, typename Store>
__device__ __forceinline__ void for_batches_in_rows(int thread, int threads, int rows, int items, Load load, Store store) {
  if (items == 0) return;
  const int row_step = threads / items, item_step = threads - row_step * items;
  int row = thread / items, item = thread - row * items;
  while (row < rows) {
    int batch_row[kBatch], batch_item[kBatch];
#pragma unroll
    for (int slot = 0; slot < kBatch; ++slot) {
      batch_row[slot] = row, batch_item[slot] = item;
      row += row_step;
      item += item_step;
      if (item >= items) item -= items, ++row;
    }
#pragma unroll
    for (int slot = 0; slot < kBatch; ++slot) {
      if (batch_row[slot] < rows) load(slot, batch_row[slot], batch_item[slot]);
    }
#pragma unroll
    for (int slot = 0; slot < kBatch; ++slot) {
      if (batch_row[slot] < rows) store(slot, batch_row[slot], batch_item[slot]);
    }
  }
}

// Rows 0..rows-1 of a tile, turned by `threads` threads. with_row(row, turn) calls turn(to, from, cos, sin) unless the row is
// to be left out; the channels that do not turn are copied. kAhead: the loads of several units are under way at a time, for some
// instructions and registers more: where memory's latency is all that a block waits for.
template <typename T, Pairing kPairing, bool kAhead, typename WithRow>
__device__ __forceinline__ void rotate_rows_as(int thread, int threads, int rows, int head_dim, const Tables& tables,
                                               WithRow with_row) {
  const int units_per_row = tables.rotary_dim / kUnitChannels<kPairing>;
  if constexpr (kAhead) {
    constexpr int kBatch = kPairing == Pairing::kHalf8 ? 2 : 3;
    RotaryUnit<T, kPairing> units[kBatch];
    for_batches_in_rows<kBatch>(
        thread, threads, rows, units_per_row,
        [&](int slot, int row, int unit) {
          with_row(row, [&](auto, const Element<T>* from, const float* cos, const float* sin) {
            units[slot].load(from, cos, sin, tables, unit);
          });
        },
        [&](int slot, int row, int) {
          with_row(row, [&](auto to, const Element<T>*, const float*, const float*) { units[slot].store(to, tables.pair_stride); });
        });
  } else {
    for_each_in_rows(thread, threads, rows, units_per_row, [&](int row, int unit) {
      with_row(row, [&](auto to, const Element<T>* from, const float* cos, const float* sin) {
        RotaryUnit<T, kPairing> one;
        one.load(from, cos, sin, tables, unit);
        one.store(to, tables.pair_stride);
      });
    });
  }
  for_each_in_rows(thread, threads, rows, (head_dim - tables.rotary_dim) / 2, [&](int row, int two) {
    with_row(row, [&](auto to, const Element<T>* from, const float*, const float*) {
      const int channel = tables.rotary_dim + 2 * two;
      *reinterpret_cast<Packed<T, 2>*>(to(channel)) = *reinterpret_cast<const Packed<T, 2>*>(from + channel);
    });
  });
}

template <typename T, bool kAhead = false, typename WithRow>
__device__ __forceinline__ void rotate_rows(int thread, int threads, int rows, int head_dim, const Tables& tables,
                                            WithRow with_row) {
  switch (pairing_of(tables)) {
    case Pairing::kHalf8: return rotate_rows_as<T, Pairing::kHalf8, kAhead>(thread, threads, rows, head_dim, tables, with_row);
    case Pairing::kHalf4: return rotate_rows_as<T, Pairing::kHalf4, kAhead>(thread, threads, rows, head_dim, tables, with_row);
    case Pairing::kInterleaved:
      return rotate_rows_as<T, Pairing::kInterleaved, kAhead>(thread, threads, rows, head_dim, tables, with_row);
    case Pairing::kGeneric: return rotate_rows_as<T, Pairing::kGeneric, kAhead>(thread, threads, rows, head_dim, tables, with_row);
  }
}

}  // namespace comp_kernels
