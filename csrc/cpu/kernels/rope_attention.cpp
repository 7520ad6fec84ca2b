// rope_attention on the CPU.
#include "../rope_attention.h"

#include <cmath>
#include <limits>
#include <vector>

#include "../parallel.h"
#include "half.h"
#include "simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

using Params = comp_kernels_rope_attention_params;

template <typename T>
struct Table {
  const T *cos, *sin;
  int64_t width, heads;
};

template <typename S, typename T>
void load_rotated(const S* x, T* y, const T* cos, const T* sin, const Params& p) {
  for (int64_t d = 0; d < p.head_dim; ++d) y[d] = widen(x[d]);
  if (cos == nullptr) return;
  const int64_t s = p.pair_stride;
  for (int64_t block = 0; block < p.rotary_dim / 2; block += s) {
    for (int64_t j = 0; j < s; ++j) {
      const int64_t a = 2 * block + j, b = a + s;
      const bool half = p.table_width != p.rotary_dim;
      const int64_t ta = half ? block + j : a, tb = half ? block + j : b;
      const T x0 = y[a], x1 = y[b];
      y[a] = x0 * cos[ta] - x1 * sin[ta];
      y[b] = x1 * cos[tb] + x0 * sin[tb];
    }
  }
}

template <typename S, typename T>
void store_unrotated(T* g, const S* x, S* y, const T* cos, const T* sin, T* dcos, T* dsin, const Params& p) {
  if (cos != nullptr) {
    const int64_t s = p.pair_stride;
    for (int64_t block = 0; block < p.rotary_dim / 2; block += s) {
      for (int64_t j = 0; j < s; ++j) {
        const int64_t a = 2 * block + j, b = a + s;
        const bool half = p.table_width != p.rotary_dim;
        const int64_t ta = half ? block + j : a, tb = half ? block + j : b;
        const T g0 = g[a], g1 = g[b];
        if (dcos != nullptr) {
          const T x0 = widen(x[a]), x1 = widen(x[b]);
          if (half) {
            dcos[ta] = g0 * x0 + g1 * x1;
            dsin[ta] = g1 * x0 - g0 * x1;
          } else {
            dcos[ta] = g0 * x0;
            dcos[tb] = g1 * x1;
            dsin[ta] = -g0 * x1;
            dsin[tb] = g1 * x0;
          }
        }
        g[a] = g0 * cos[ta] + g1 * sin[tb];
        g[b] = g1 * cos[tb] - g0 * sin[ta];
      }
    }
  }
  for (int64_t d = 0; d < p.head_dim; ++d) narrow(g[d], y[d]);
}

template <typename T>
const T* table_row(const void* table, int64_t token, int64_t head, int64_t heads, int64_t width) {
  return table == nullptr ? nullptr : static_cast<const T*>(table) + (token * heads + (heads > 1 ? head : 0)) * width;
}

template <typename S, typename T>
void forward(const Params& p) {
  const int64_t D = p.head_dim, group = p.num_heads / p.num_heads_k;
  const S *q = static_cast<const S*>(p.q), *k = static_cast<const S*>(p.k), *v = static_cast<const S*>(p.v);
  S* out = static_cast<S*>(p.out);
  T* lse = static_cast<T*>(p.lse);
  const int64_t end = p.cu_seqlens[p.num_sequences];
  for (int64_t t = end * p.num_heads * D; t < p.num_tokens * p.num_heads * D; ++t) narrow(T(0), out[t]);
  for (int64_t h = 0; h < p.num_heads; ++h) {
    for (int64_t t = end; t < p.num_tokens; ++t) lse[h * p.num_tokens + t] = -std::numeric_limits<T>::infinity();
  }
  parallel_items(num_workers(), p.num_sequences * p.num_heads, [&](int64_t, int64_t item) {
    const int64_t b = item / p.num_heads, h = item % p.num_heads, hk = h / group;
    const int64_t i0 = p.cu_seqlens[b], i1 = p.cu_seqlens[b + 1], j0 = p.cu_seqlens_k[b], j1 = p.cu_seqlens_k[b + 1];
    std::vector<T> keys((j1 - j0) * D), query(D), scores(j1 - j0), row(D);
    for (int64_t j = j0; j < j1; ++j) {
      load_rotated(k + j * p.k_stride_token + hk * p.k_stride_head, &keys[(j - j0) * D],
                   table_row<T>(p.cos_k, j, hk, p.table_heads_k, p.table_width),
                   table_row<T>(p.sin_k, j, hk, p.table_heads_k, p.table_width), p);
    }
    for (int64_t i = i0; i < i1; ++i) {
      load_rotated(q + i * p.q_stride_token + h * p.q_stride_head, query.data(),
                   table_row<T>(p.cos, i, h, p.table_heads, p.table_width),
                   table_row<T>(p.sin, i, h, p.table_heads, p.table_width), p);
      T top = -std::numeric_limits<T>::infinity(), sum = 0;
      for (int64_t j = 0; j < j1 - j0; ++j) {
        T s = 0;
        for (int64_t d = 0; d < D; ++d) s += query[d] * keys[j * D + d];
        scores[j] = s * T(p.scale);
        top = std::fmax(top, scores[j]);
      }
      for (T& x : row) x = 0;
      for (int64_t j = 0; j < j1 - j0; ++j) {
        const T e = std::exp(scores[j] - top);
        sum += e;
        const S* value = v + (j0 + j) * p.v_stride_token + hk * p.v_stride_head;
        for (int64_t d = 0; d < D; ++d) row[d] += e * widen(value[d]);
      }
      for (int64_t d = 0; d < D; ++d) narrow(j1 > j0 ? row[d] / sum : T(0), out[(i * p.num_heads + h) * D + d]);
      lse[h * p.num_tokens + i] = j1 > j0 ? top + std::log(sum) : -std::numeric_limits<T>::infinity();
    }
  });
}

template <typename S, typename T>
void backward(const Params& p) {
  const int64_t D = p.head_dim, group = p.num_heads / p.num_heads_k, W = p.table_width;
  const S *q = static_cast<const S*>(p.q), *k = static_cast<const S*>(p.k), *v = static_cast<const S*>(p.v);
  const S *out = static_cast<const S*>(p.out), *grad = static_cast<const S*>(p.grad_out);
  S *dq = static_cast<S*>(p.dq), *dk = static_cast<S*>(p.dk), *dv = static_cast<S*>(p.dv);
  const T *lse = static_cast<const T*>(p.lse), *grad_lse = static_cast<const T*>(p.grad_lse);
  const int64_t end = p.cu_seqlens[p.num_sequences], end_k = p.cu_seqlens_k[p.num_sequences];
  const auto zero = [](void* x, int64_t from, int64_t to, int64_t bytes) {
    if (x != nullptr) std::memset(static_cast<char*>(x) + from * bytes, 0, (to - from) * bytes);
  };
  zero(dq, end, p.num_tokens, p.num_heads * D * sizeof(S));
  for (void* x : {p.dk, p.dv}) zero(x, end_k, p.num_tokens_k, p.num_heads_k * D * sizeof(S));
  for (void* x : {p.dcos, p.dsin}) zero(x, end, p.num_tokens, p.num_heads * W * sizeof(T));
  for (void* x : {p.dcos_k, p.dsin_k}) zero(x, end_k, p.num_tokens_k, p.num_heads_k * W * sizeof(T));
  parallel_items(num_workers(), p.num_sequences * p.num_heads_k, [&](int64_t, int64_t item) {
    const int64_t b = item / p.num_heads_k, hk = item % p.num_heads_k;
    const int64_t i0 = p.cu_seqlens[b], i1 = p.cu_seqlens[b + 1], j0 = p.cu_seqlens_k[b], j1 = p.cu_seqlens_k[b + 1];
    std::vector<T> keys((j1 - j0) * D), query(D), gkey((j1 - j0) * D, 0), gvalue((j1 - j0) * D, 0), gquery(D);
    for (int64_t j = j0; j < j1; ++j) {
      load_rotated(k + j * p.k_stride_token + hk * p.k_stride_head, &keys[(j - j0) * D],
                   table_row<T>(p.cos_k, j, hk, p.table_heads_k, W), table_row<T>(p.sin_k, j, hk, p.table_heads_k, W), p);
    }
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
      for (int64_t i = i0; i < i1; ++i) {
        const T *cos = table_row<T>(p.cos, i, h, p.table_heads, W), *sin = table_row<T>(p.sin, i, h, p.table_heads, W);
        const S* query_in = q + i * p.q_stride_token + h * p.q_stride_head;
        load_rotated(query_in, query.data(), cos, sin, p);
        const S* go = grad + i * p.grad_out_stride_token + h * p.grad_out_stride_head;
        T delta = grad_lse == nullptr ? T(0) : -grad_lse[h * p.num_tokens + i];
        for (int64_t d = 0; d < D; ++d) delta += widen(go[d]) * widen(out[(i * p.num_heads + h) * D + d]);
        for (T& x : gquery) x = 0;
        for (int64_t j = 0; j < j1 - j0; ++j) {
          const S* value = v + (j0 + j) * p.v_stride_token + hk * p.v_stride_head;
          T s = 0, dp = 0;
          for (int64_t d = 0; d < D; ++d) s += query[d] * keys[j * D + d], dp += widen(go[d]) * widen(value[d]);
          const T e = std::exp(s * T(p.scale) - lse[h * p.num_tokens + i]), ds = e * (dp - delta) * T(p.scale);
          for (int64_t d = 0; d < D; ++d) {
            gvalue[j * D + d] += e * widen(go[d]);
            gkey[j * D + d] += ds * query[d];
            gquery[d] += ds * keys[j * D + d];
          }
        }
        T* dcos = p.dcos == nullptr ? nullptr : static_cast<T*>(p.dcos) + (i * p.num_heads + h) * W;
        T* dsin = p.dsin == nullptr ? nullptr : static_cast<T*>(p.dsin) + (i * p.num_heads + h) * W;
        store_unrotated(gquery.data(), query_in, dq + (i * p.num_heads + h) * D, cos, sin, dcos, dsin, p);
      }
    }
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t row = j * p.num_heads_k + hk;
      T* dcos = p.dcos_k == nullptr ? nullptr : static_cast<T*>(p.dcos_k) + row * W;
      T* dsin = p.dsin_k == nullptr ? nullptr : static_cast<T*>(p.dsin_k) + row * W;
      store_unrotated(&gkey[(j - j0) * D], k + j * p.k_stride_token + hk * p.k_stride_head, dk + row * D,
                      table_row<T>(p.cos_k, j, hk, p.table_heads_k, W), table_row<T>(p.sin_k, j, hk, p.table_heads_k, W), dcos,
                      dsin, p);
      for (int64_t d = 0; d < D; ++d) narrow(gvalue[(j - j0) * D + d], dv[row * D + d]);
    }
  });
}

}  // namespace

const char* rope_attention_forward(const Params& params) {
  switch (params.dtype) {
    case COMP_KERNELS_FLOAT64: forward<double, double>(params); break;
    case COMP_KERNELS_BFLOAT16: forward<bfloat16, float>(params); break;
    case COMP_KERNELS_FLOAT16: forward<float16, float>(params); break;
    default: forward<float, float>(params);
  }
  return nullptr;
}

const char* rope_attention_backward(const Params& params) {
  switch (params.dtype) {
    case COMP_KERNELS_FLOAT64: backward<double, double>(params); break;
    case COMP_KERNELS_BFLOAT16: backward<bfloat16, float>(params); break;
    case COMP_KERNELS_FLOAT16: backward<float16, float>(params); break;
    default: backward<float, float>(params);
  }
  return nullptr;
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
