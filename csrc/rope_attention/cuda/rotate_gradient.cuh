// Gradients through the rotary rule, from rows of float32 in shared memory: the true transpose for x, products for the tables.
//
//     y1 = x1 c1 - x2 s1    y2 = x2 c2 + x1 s2
//     dx1 = dy1 c1 + dy2 s2    dx2 = dy2 c2 - dy1 s1    dc1 = dy1 x1    dc2 = dy2 x2    ds1 = -dy1 x2    ds2 = dy2 x1
#pragma once

#include "rotate.cuh"

namespace comp_kernels {

// Where the gradients of one packed tensor go.
struct GradientParams {
  void* dx;       // [tokens, heads, head_dim] contiguous
  const void* x;  // the tensor itself, needed for the gradients of the tables
  int64_t x_stride_token, x_stride_head;
  Tables tables;  // cos == nullptr: x was not turned
  float* dcos;    // [tokens, heads, width] contiguous; null: not wanted
  float* dsin;
  int heads;
};

template <int kCount>
__device__ __forceinline__ void read_floats(float (&x)[kCount], const float* from) {
  if constexpr (kCount == 4) {
    const float4 value = *reinterpret_cast<const float4*>(from);
    x[0] = value.x, x[1] = value.y, x[2] = value.z, x[3] = value.w;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = from[i];
  }
}

// kVec pairs: channels first.. and first + pair_stride.. of one row.
template <typename T, int kVec>
__device__ __forceinline__ void rotate_gradient_unit(const GradientParams& params, const float* dy, int64_t token, int head,
                                                     int unit, int head_dim) {
  const Tables& tables = params.tables;
  const int stride = tables.pair_stride;
  const bool half_width = tables.width != tables.rotary_dim;
  const int block = 2 * stride == tables.rotary_dim ? 0 : unit * kVec / stride;
  const int first = unit * kVec + block * stride;
  const int table_first = half_width ? unit * kVec : first;
  const int table_second = half_width ? table_first : first + stride;
  const int64_t table_row = token * tables.token_stride + head * tables.head_stride;
  const int64_t row = token * params.heads + head;

  float first_dy[kVec], second_dy[kVec], cos1[kVec], sin1[kVec], cos2[kVec], sin2[kVec], dx1[kVec], dx2[kVec];
  read_floats(first_dy, dy + first);
  read_floats(second_dy, dy + first + stride);
  read_floats(cos1, tables.cos + table_row + table_first);
  read_floats(sin1, tables.sin + table_row + table_first);
  read_floats(cos2, tables.cos + table_row + table_second);
  read_floats(sin2, tables.sin + table_row + table_second);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float dy1 = first_dy[i], dy2 = second_dy[i];
    dx1[i] = dy1 * cos1[i] + dy2 * sin2[i];
    dx2[i] = dy2 * cos2[i] - dy1 * sin1[i];
    if (params.dcos == nullptr) continue;
    const Element<T>* x = elements<T>(params.x) + token * params.x_stride_token + head * params.x_stride_head;
    const float x1 = to_float<T>(x[first + i]), x2 = to_float<T>(x[first + stride + i]);
    float* dcos = params.dcos + row * tables.width;
    float* dsin = params.dsin + row * tables.width;
    if (half_width) {
      dcos[table_first + i] = dy1 * x1 + dy2 * x2;
      dsin[table_first + i] = dy2 * x1 - dy1 * x2;
    } else {
      dcos[table_first + i] = dy1 * x1;
      dcos[table_second + i] = dy2 * x2;
      dsin[table_first + i] = -dy1 * x2;
      dsin[table_second + i] = dy2 * x1;
    }
  }

  Element<T>* dx = elements<T>(params.dx) + row * head_dim;
  if constexpr (kVec == 1) {
    store_two<T>(dx + first, dx + first + stride, dx1[0], dx2[0]);
  } else {
    Packed<T, kVec> a, b;
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) {
      a.set(i, dx1[2 * i], dx1[2 * i + 1]);
      b.set(i, dx2[2 * i], dx2[2 * i + 1]);
    }
    *reinterpret_cast<Packed<T, kVec>*>(dx + first) = a;
    *reinterpret_cast<Packed<T, kVec>*>(dx + first + stride) = b;
  }
}

// One warp writes the gradients of `rows` tokens from `token` on; dy [rows, head_dim] lies in shared memory, row_floats apart.
template <typename T>
__device__ void rotate_gradient_rows(const GradientParams& params, const float* dy, int row_floats, int rows, int64_t token,
                                     int head, int head_dim) {
  const bool turned = params.tables.cos != nullptr;
  const int rotary_dim = turned ? params.tables.rotary_dim : 0;
  if (turned && params.tables.pair_stride % 4 == 0) {
    for_each_in_rows(threadIdx.x % 32, 32, rows, rotary_dim / 8, [&](int row, int unit) {
      rotate_gradient_unit<T, 4>(params, dy + row * row_floats, token + row, head, unit, head_dim);
    });
  } else if (turned) {
    for_each_in_rows(threadIdx.x % 32, 32, rows, rotary_dim / 2, [&](int row, int unit) {
      rotate_gradient_unit<T, 1>(params, dy + row * row_floats, token + row, head, unit, head_dim);
    });
  }
  for_each_in_rows(threadIdx.x % 32, 32, rows, (head_dim - rotary_dim) / 2, [&](int row, int two) {
    const int channel = rotary_dim + 2 * two;
    const float2 from = *reinterpret_cast<const float2*>(dy + row * row_floats + channel);
    Packed<T, 2> to;
    to.set(0, from.x, from.y);
    *reinterpret_cast<Packed<T, 2>*>(elements<T>(params.dx) + ((token + row) * params.heads + head) * head_dim + channel) = to;
  });
}

// Rows that took part in nothing: zeros, without reading what may lie in their x and tables.
template <typename T, int kThreads>
__device__ void zero_gradient_rows(const GradientParams& params, int rows, int64_t token, int head, int head_dim) {
  for_each_in_rows(threadIdx.x, kThreads, rows, head_dim / 2, [&](int row, int two) {
    Element<T>* dx = elements<T>(params.dx) + ((token + row) * params.heads + head) * head_dim + 2 * two;
    *reinterpret_cast<Packed<T, 2>*>(dx) = Packed<T, 2>{};
  });
  if (params.dcos == nullptr) return;
  for_each_in_rows(threadIdx.x, kThreads, rows, params.tables.width, [&](int row, int i) {
    const int64_t at = ((token + row) * params.heads + head) * params.tables.width + i;
    params.dcos[at] = params.dsin[at] = 0.f;
  });
}

}  // namespace comp_kernels
