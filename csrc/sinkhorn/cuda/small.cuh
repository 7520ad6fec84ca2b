// Sinkhorn over many small matrices, forward and backward in one launch each: kSide lanes hold a matrix for all iterations.
//
// Lane l of a group owns entry l of both sides: the entries E_lf and E_sl, both in registers, and the scalings x_l and w_l. What a
// half step needs of the others it reads from shared memory, 16 bytes at a time, so no sum crosses lanes. The iterations are those
// of csrc/sinkhorn/cpu/kernels/small_linear.h, and for matrices that span too many bits those of small_logs.h; a warp runs
// the latter when one of its matrices needs them, and each matrix keeps its own result.
#pragma once

#include "common/cuda/ptx.cuh"
#include "entries.cuh"
#include "sinkhorn.h"

namespace comp_kernels {

struct SinkhornSmallParams {
  const void* scores;      // [items, n, K], items item_stride apart, each contiguous
  const float* a;          // [second] per item, stride a_stride (0: shared): marginals of the side scaled second; null: a_each
  const float* b;          // [first] per item, stride b_stride; null: b_each
  float* plan;             // [items, n, K]
  float* u;                // [items, second], natural logarithms
  float* v;                // [items, first]
  const float* grad_plan;  // [items, n, K]; null: zeros
  const float* grad_u;     // [items, second]; null: zeros
  const float* grad_v;     // [items, first]; null: zeros
  void* grad_scores;       // [items, n, K] T
  float* history;          // [2, iterations + 1, threads of the grid]: scalings of every iteration; null: in shared memory
  int64_t items, item_stride, a_stride, b_stride;
  int second, first;                    // sides
  int second_stride, first_stride;      // of their entries within a matrix
  int iterations;
  float factor;  // log2(e) / epsilon
  float eps;     // 0, or what is added to the first softmax and to every later sum
  float scale;   // 1 / epsilon
  float a_each, b_each;
};

constexpr int kSmallThreads = 128;
constexpr float kSmallScoreBits = 48.f, kSmallMarginalRatio = 1048576.f;  // as in csrc/sinkhorn/cpu/kernels/small.cpp

template <typename T>
__device__ __forceinline__ void store_score(void* to, int64_t at, float x) {
  if constexpr (kIsFloat<T>) {
    static_cast<float*>(to)[at] = x;
  } else {
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(pack<T>(x, 0.f));
  }
}

// One number per lane, seen by the kSide lanes of its group. Two of them in turn need one barrier per number: who writes one again
// has passed the other's barrier, after everybody's reads.
struct SharedVector {
  float numbers[kSmallThreads];

  __device__ __forceinline__ void put(float x) {
    numbers[threadIdx.x] = x;
    __syncwarp();
  }
};

// f(i, number of lane i of the group), 16 bytes per read. `numbers` starts with the group's first lane.
template <int kSide, typename F>
__device__ __forceinline__ void for_group(const float* numbers, F&& f) {
#pragma unroll
  for (int i = 0; i < kSide; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(numbers + i);
    f(i, four.x), f(i + 1, four.y), f(i + 2, four.z), f(i + 3, four.w);
  }
}

template <int kSide>
__device__ __forceinline__ float dot(const float (&e)[kSide], const float* numbers) {
  float sums[2] = {};
  for_group<kSide>(numbers, [&](int i, float x) { sums[i % 2] = fmaf(e[i], x, sums[i % 2]); });
  return sums[0] + sums[1];
}

template <int kSide, typename F>
__device__ __forceinline__ float reduce_group(float x, F&& f) {
#pragma unroll
  for (int step = kSide / 2; step > 0; step /= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

template <typename T, int kSide>
struct SmallMatrix {
  const SinkhornSmallParams& p;
  SharedVector &of_x, &of_w;
  int lane, start;       // in the group; the group's first thread in the block
  int64_t item;          // clamped: groups beyond the last matrix repeat it and write nothing
  bool there;
  float own_row[kSide];  // E_lf
  float own_col[kSide];  // E_sl
  float a, b;            // marginals of entry l
  float x, w;            // its scalings

  __device__ __forceinline__ SmallMatrix(const SinkhornSmallParams& p, SharedVector& of_x, SharedVector& of_w)
      : p(p), of_x(of_x), of_w(of_w), lane(threadIdx.x % kSide), start(threadIdx.x - threadIdx.x % kSide) {
    const int64_t wanted = (static_cast<int64_t>(blockIdx.x) * kSmallThreads + threadIdx.x) / kSide;
    there = wanted < p.items;
    item = there ? wanted : p.items - 1;
    a = in_second() ? marginal(p.a, item * p.a_stride + lane, p.a_each) : 0.f;
    b = in_first() ? marginal(p.b, item * p.b_stride + lane, p.b_each) : 0.f;
  }

  __device__ __forceinline__ bool in_second() const { return lane < p.second; }
  __device__ __forceinline__ bool in_first() const { return lane < p.first; }
  __device__ __forceinline__ int at(int s, int f) const { return s * p.second_stride + f * p.first_stride; }
  __device__ __forceinline__ bool has(int s, int f) const { return s < p.second && f < p.first; }
  __device__ __forceinline__ int64_t base() const { return item * p.second * p.first; }
  __device__ __forceinline__ const float* xs() const { return of_x.numbers + start; }
  __device__ __forceinline__ const float* ws() const { return of_w.numbers + start; }

  // The scores of this lane's row and column; `missing` in the padding.
  __device__ __forceinline__ void load(float missing) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      float one[1];
      own_row[i] = own_col[i] = missing;
      if (has(lane, i)) load_scores<T, 1>(one, p.scores, item * p.item_stride + at(lane, i)), own_row[i] = one[0];
      if (has(i, lane)) load_scores<T, 1>(one, p.scores, item * p.item_stride + at(i, lane)), own_col[i] = one[0];
    }
  }

  __device__ __forceinline__ bool even(float marginal, bool mine) const {
    const float most = reduce_group<kSide>(mine ? marginal : 0.f, [](float x, float y) { return fmaxf(x, y); });
    const float least =
        reduce_group<kSide>(mine && marginal != 0.f ? marginal : kInfinity, [](float x, float y) { return fminf(x, y); });
    const float sum = reduce_group<kSide>(mine ? marginal : 0.f, [](float x, float y) { return x + y; });  // sees NaN
    return most <= least * kSmallMarginalRatio && sum < kInfinity && least < kInfinity;
  }

  // E = 2^(score - maximum), 0 in the padding. Returns the shift in bits; whether the linear iterations serve goes to `safe`.
  __device__ __forceinline__ float prepare(bool& safe) {
    load(-kInfinity);
    float top = own_row[0], bottom = kInfinity;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      top = fmaxf(top, own_row[i]);
      bottom = fminf(bottom, has(lane, i) ? own_row[i] : kInfinity);
    }
    top = reduce_group<kSide>(top, [](float x, float y) { return fmaxf(x, y); });
    bottom = reduce_group<kSide>(bottom, [](float x, float y) { return fminf(x, y); });
    safe = (top - bottom) * p.factor <= kSmallScoreBits;
    safe = even(a, in_second()) && safe;
    safe = even(b, in_first()) && safe;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      own_row[i] = has(lane, i) ? exp2_approx((own_row[i] - top) * p.factor) : 0.f;
      own_col[i] = has(i, lane) ? exp2_approx((own_col[i] - top) * p.factor) : 0.f;
    }
    return top * p.factor;
  }

  // With eps: E = softmax over the second side, to which the caller adds eps. Zeros for an entry without mass, whose scores may
  // be anything (-inf all of them, say).
  __device__ __forceinline__ void prepare_softmax() {
    load(-kInfinity);
    float top = own_col[0];
#pragma unroll
    for (int i = 1; i < kSide; ++i) top = fmaxf(top, own_col[i]);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      own_col[i] = has(i, lane) ? exp2_approx((own_col[i] - top) * p.factor) : 0.f;
      sum += own_col[i];
    }
    of_x.put(top);
    for_group<kSide>(xs(), [&](int i, float top) { own_row[i] = has(lane, i) ? exp2_approx((own_row[i] - top) * p.factor) : 0.f; });
    const float inverse = in_first() && b != 0.f ? 1.f / sum : 0.f;
    of_w.put(inverse);
    for_group<kSide>(ws(), [&](int i, float inverse) { own_row[i] = inverse == 0.f ? 0.f : own_row[i] * inverse; });
#pragma unroll
    for (int i = 0; i < kSide; ++i) own_col[i] = inverse == 0.f ? 0.f : own_col[i] * inverse;
  }

  __device__ __forceinline__ void add_eps() {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      own_row[i] += has(lane, i) ? p.eps : 0.f;
      own_col[i] += has(i, lane) ? p.eps : 0.f;
    }
  }

  // keep(t, x, w) after every iteration t, and before the first as t = 0.
  template <bool kEps, typename Keep>
  __device__ __forceinline__ void iterate(Keep&& keep) {
    x = a == 0.f ? 0.f : 1.f;  // 0 in the padding
    w = b;
    keep(0, x, w);
    of_x.put(x);
    for (int t = 1; t <= p.iterations; ++t) {
      const float sum = dot<kSide>(own_col, xs());
      if (kEps) {
        w = t == 1 ? w : __fdividef(w * b, fmaf(w, sum, p.eps));
      } else {
        w = in_first() ? __fdividef(b, sum) : 0.f;
      }
      of_w.put(w);
      const float sum_of_f = dot<kSide>(own_row, ws());
      if (kEps) {
        x = __fdividef(x * a, fmaf(x, sum_of_f, p.eps));
      } else {
        x = in_second() ? __fdividef(a, sum_of_f) : 0.f;
      }
      of_x.put(x);
      keep(t, x, w);
    }
  }

  // log2 of the sum of 2^(bits + others)
  static __device__ __forceinline__ float log_sum(const float (&bits)[kSide], const float* others) {
    float entries[kSide];
    for_group<kSide>(others, [&](int i, float x) { entries[i] = bits[i] + x; });
    LogSum sum;
    sum.add(entries);
    return sum.log2();
  }

  // Weights 2^(bits + others) over their sum, times `rate`: a softmax that sums to one whatever its potentials were rounded at.
  template <typename F>
  static __device__ __forceinline__ void shares(const float (&bits)[kSide], const float* others, float rate, F&& take) {
    float entries[kSide], sum = 0.f;
    for_group<kSide>(others, [&](int i, float x) { entries[i] = bits[i] + x; });
    float peak = entries[0];
#pragma unroll
    for (int i = 1; i < kSide; ++i) peak = fmaxf(peak, entries[i]);
    peak = LogSum::finite(peak);
#pragma unroll
    for (int i = 0; i < kSide; ++i) sum += entries[i] = exp2_approx(entries[i] - peak);
    const float factor = rate / sum;
#pragma unroll
    for (int i = 0; i < kSide; ++i) take(i, rate == 0.f ? 0.f : entries[i] * factor);
  }

  // x and w become potentials in bits; own_row and own_col hold the entries in bits.
  template <typename Keep>
  __device__ __forceinline__ void iterate_logs(Keep&& keep) {
    load(-kInfinity);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      own_row[i] = has(lane, i) ? own_row[i] * p.factor : -kInfinity;
      own_col[i] = has(i, lane) ? own_col[i] * p.factor : -kInfinity;
    }
    x = a == 0.f ? -kInfinity : 0.f;
    w = b == 0.f ? -kInfinity : 0.f;
    keep(0, x, w);
    of_x.put(x);
    for (int t = 1; t <= p.iterations; ++t) {
      w = potential(b, log_sum(own_col, xs()));
      of_w.put(w);
      x = potential(a, log_sum(own_row, ws()));
      of_x.put(x);
      keep(t, x, w);
    }
  }
};

template <typename T, int kSide>
__device__ __forceinline__ void sinkhorn_small_forward(const SinkhornSmallParams& p) {
  __shared__ SharedVector of_x, of_w;
  SmallMatrix<T, kSide> m(p, of_x, of_w);
  const auto forget = [](int, float, float) {};
  bool safe = true;
  float shift = 0.f;
  if (p.eps > 0.f) {
    m.prepare_softmax();
    m.add_eps();
    __syncwarp();
    m.template iterate<true>(forget);
  } else {
    shift = m.prepare(safe);
    m.template iterate<false>(forget);
  }
  float found[kSide];
  for_group<kSide>(m.ws(), [&](int i, float w) { found[i] = m.x * m.own_row[i] * w; });
  float u = __log2f(m.x), v = __log2f(m.w) - shift;
  if (__any_sync(0xffffffffu, !safe)) {
    __syncwarp();
    m.iterate_logs(forget);
    if (!safe) {
      u = m.x, v = m.w;
      m.shares(m.own_row, m.ws(), m.a, [&](int i, float entry) { found[i] = entry; });
    }
  }
  if (!m.there) return;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    if (m.has(m.lane, i)) p.plan[m.base() + m.at(m.lane, i)] = found[i];
  }
  if (m.in_second()) p.u[m.item * p.second + m.lane] = u * kLn2;
  if (m.in_first()) p.v[m.item * p.first + m.lane] = v * kLn2;
}

// Of each iteration t: the numbers of all threads, those of a group side by side.
struct SmallHistory {
  float* numbers;
  int64_t stride;
  __device__ __forceinline__ float* at(int t) const { return numbers + t * stride; }
};

template <typename T, int kSide>
struct SmallGradient {
  SmallMatrix<T, kSide>& m;
  const SmallHistory xs, ws;  // at the group's first thread
  float gradient[kSide];      // of this lane's row
  float dx, dw;               // of the logarithms of this lane's scalings

  __device__ __forceinline__ float of_plan(int s, int f) const {
    return m.p.grad_plan != nullptr && m.has(s, f) ? m.p.grad_plan[m.base() + m.at(s, f)] : 0.f;
  }
  __device__ __forceinline__ void start() {
    dx = m.p.grad_u != nullptr && m.in_second() ? m.p.grad_u[m.item * m.p.second + m.lane] : 0.f;
    dw = m.p.grad_v != nullptr && m.in_first() ? m.p.grad_v[m.item * m.p.first + m.lane] : 0.f;
  }

  // What a scaling passes on to the one before it, with eps; nothing where it is zero.
  __device__ __forceinline__ float passed_on(float share, float before) const {
    return before == 0.f ? 0.f : __fdividef(m.p.eps * share, before);
  }

  template <bool kEps>
  __device__ __forceinline__ void linear() {
    start();
    for_group<kSide>(m.ws(), [&](int i, float w) {
      gradient[i] = of_plan(m.lane, i) * m.x * w;
      dx = fmaf(gradient[i], m.own_row[i], dx);
    });
    float sum = 0.f;
    for_group<kSide>(m.xs(), [&](int i, float x) { sum = fmaf(of_plan(i, m.lane) * x, m.own_col[i], sum); });
    dw = fmaf(sum, m.w, dw);
    const float inverse_a = m.a == 0.f ? 0.f : 1.f / m.a, inverse_b = m.b == 0.f ? 0.f : 1.f / m.b;
    __syncwarp();
    for (int t = m.p.iterations; t >= 1; --t) {
      const float x_before = xs.at(t - 1)[m.lane], w_after = ws.at(t)[m.lane];
      const float alpha = dx * xs.at(t)[m.lane] * inverse_a;
      m.of_x.put(alpha);
      dw = fmaf(-w_after, dot<kSide>(m.own_col, m.xs()), dw);
      const bool softmax = kEps && t == 1;  // is before this iteration
      const float beta = softmax ? 0.f : dw * w_after * inverse_b;
      m.of_w.put(beta);
      float through = 0.f;
      for_group<kSide>(m.ws(), [&](int i, float beta) {
        through = fmaf(m.own_row[i], beta, through);
        gradient[i] = fmaf(-x_before, beta, gradient[i]);
      });
      for_group<kSide>(ws.at(t), [&](int i, float w) { gradient[i] = fmaf(-alpha, w, gradient[i]); });
      dx = -x_before * through;
      dw = 0.f;
      if (kEps) {
        dx += passed_on(alpha, x_before);
        dw = softmax ? 0.f : passed_on(beta, ws.at(t - 1)[m.lane]);
      }
    }
  }

  __device__ __forceinline__ void logs() {
    start();
    m.shares(m.own_row, m.ws(), m.a, [&](int i, float entry) {
      gradient[i] = of_plan(m.lane, i) * entry;
      dx += gradient[i];
    });
    // Column sums of the same: the lanes that own the columns add up what the rows' lanes found.
#pragma unroll
    for (int i = 0; i < kSide; ++i) add_to_column(i, gradient[i]);
    for (int t = m.p.iterations; t >= 1; --t) {
      const float rate = m.a == 0.f ? 0.f : dx;
      m.shares(m.own_row, ws.at(t), rate, [&](int i, float share) {
        gradient[i] -= share;
        add_to_column(i, -share);
      });
      const float rate_b = m.b == 0.f ? 0.f : dw;
      float passed[kSide];
      m.shares(m.own_col, xs.at(t - 1), rate_b, [&](int i, float share) { passed[i] = share; });
      dx = dw = 0.f;
      // Lane l has the shares of column l; they belong to the rows.
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const float sum = reduce_group<kSide>(passed[i], [](float x, float y) { return x + y; });
        if (i == m.lane) dx = -sum;
      }
      transpose(passed);
#pragma unroll
      for (int i = 0; i < kSide; ++i) gradient[i] -= passed[i];
    }
  }

  // dw of lane i += the sum of `number` over the group
  __device__ __forceinline__ void add_to_column(int i, float number) {
    const float sum = reduce_group<kSide>(number, [](float x, float y) { return x + y; });
    if (i == m.lane) dw += sum;
  }

  // Number i of lane l becomes number l of lane i: in every step half of the numbers change lanes.
  __device__ __forceinline__ void transpose(float (&x)[kSide]) const {
#pragma unroll
    for (int step = 1; step < kSide; step *= 2) {
      const bool upper = m.lane & step;
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        if ((i & step) == 0) {
          const float other = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + step], step);
          (upper ? x[i] : x[i + step]) = other;
        }
      }
    }
  }
};

template <typename T, int kSide>
__device__ __forceinline__ void sinkhorn_small_backward(const SinkhornSmallParams& p) {
  __shared__ SharedVector of_x, of_w;
  extern __shared__ __align__(16) float kept[];
  SmallMatrix<T, kSide> m(p, of_x, of_w);
  const bool in_shared = p.history == nullptr;
  const int64_t stride = in_shared ? kSmallThreads : static_cast<int64_t>(gridDim.x) * kSmallThreads;
  float* const first = (in_shared ? kept : p.history + static_cast<int64_t>(blockIdx.x) * kSmallThreads) + m.start;
  const SmallHistory xs{first, stride}, ws{first + (p.iterations + 1) * stride, stride};
  const auto keep = [&](int t, float x, float w) { xs.at(t)[m.lane] = x, ws.at(t)[m.lane] = w; };
  SmallGradient<T, kSide> g{m, xs, ws};
  float result[kSide];
  bool safe = true;
  if (p.eps > 0.f) {
    m.prepare_softmax();
    __syncwarp();
    float softmax[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) softmax[i] = m.own_row[i];
    m.add_eps();
    m.template iterate<true>(keep);
    __syncwarp();
    g.template linear<true>();
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const float mean = reduce_group<kSide>(softmax[i] * g.gradient[i], [](float x, float y) { return x + y; });
      result[i] = softmax[i] * (g.gradient[i] - mean);
    }
  } else {
    m.prepare(safe);
    m.template iterate<false>(keep);
    __syncwarp();
    g.template linear<false>();
#pragma unroll
    for (int i = 0; i < kSide; ++i) result[i] = g.gradient[i] * m.own_row[i];
    if (__any_sync(0xffffffffu, !safe)) {
      __syncwarp();
      m.iterate_logs(keep);
      __syncwarp();
      g.logs();
#pragma unroll
      for (int i = 0; i < kSide; ++i) result[i] = safe ? result[i] : g.gradient[i];
    }
  }
  if (!m.there) return;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    if (m.has(m.lane, i)) store_score<T>(p.grad_scores, m.base() + m.at(m.lane, i), result[i] * p.scale);
  }
}

}  // namespace comp_kernels

#define INSTANTIATE_SINKHORN_SMALL_PASS(pass, T, kSide)                                                                            \
  DEFINE_KERNEL(sinkhorn_small_##pass##_##T##_##kSide, SinkhornSmallParams, sinkhorn_small_##pass, sinkhorn_small_##pass##_kernel, \
                (T, kSide), (FixedBlock<kSmallThreads, kSmallThreads / kSide>), kRows)
#define INSTANTIATE_SINKHORN_SMALL(T)              \
  INSTANTIATE_SINKHORN_SMALL_PASS(forward, T, 4)   \
  INSTANTIATE_SINKHORN_SMALL_PASS(forward, T, 8)   \
  INSTANTIATE_SINKHORN_SMALL_PASS(forward, T, 16)  \
  INSTANTIATE_SINKHORN_SMALL_PASS(forward, T, 32)  \
  INSTANTIATE_SINKHORN_SMALL_PASS(backward, T, 4)  \
  INSTANTIATE_SINKHORN_SMALL_PASS(backward, T, 8)  \
  INSTANTIATE_SINKHORN_SMALL_PASS(backward, T, 16) \
  INSTANTIATE_SINKHORN_SMALL_PASS(backward, T, 32)
