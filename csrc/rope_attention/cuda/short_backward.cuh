// rope_attention backward for short sequences (mma.sync, sm_80 and later): one launch, no workspace, no atomics.
//
// A block owns up to kKeys keys of one sequence and key head, each warp some of them; it keeps turned keys and values in
// shared memory and walks over the queries in chunks of kQueries, and over the query heads that share the key head:
//   1. the chunk comes in: queries turned, dO as it is, delta = dO . out on the way;
//   2. every warp: S^T = K Q^T, dP^T = V dO^T, P and dS in registers, dV += P^T dO, dK += dS^T Q; dS goes to shared memory;
//   3. every warp takes other rows: dQ = dS K over all keys, in order; turned back and written.
// Five products and one order of summation. Where a sequence has more keys than a block, 3. is left out; the dQ of its chunks
// are shared out among its blocks afterwards, which compute dS once more: right for any length, made for short ones.
#pragma once

#include "backward.cuh"
#include "short_sequences.cuh"

namespace comp_kernels {

struct ShortBackwardParams {
  Operand q, k, v, grad_out;  // as given: not turned
  const void* out;            // [T, Hq, D] contiguous
  const double* lse;          // [Hq, T]
  const double* grad_lse;     // [Hq, T], or null
  GradientParams dq, dk, dv;
  const int32_t* cu_seqlens;
  const int32_t* cu_seqlens_k;
  int sequences, num_tokens, num_tokens_k;
  int heads_per_key_head;
  float scale;
};

// kMostKeys: 64 or 256, as in forward.
template <int kHeadDimension, int kMostKeys>
struct ShortBackwardConfig {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr bool kSmall = kMostKeys == 64;
  static constexpr int kBlocks = kSmall || kHeadDim > 80 ? 1 : 2;  // of 16 keys per warp; registers decide
  static constexpr int kPadding = 16 * kBlocks;
  static constexpr int kThreads = kSmall ? 128 : 256;
  static constexpr int kKeys = kThreads / 32 * 16 * kBlocks;
  static constexpr int kQueries = kThreads / 32 * 16;  // of a chunk
  static constexpr int kRowBytes = kPaddedRowBytes<bf16, kHeadDim>;
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  static constexpr int kQueryBytes = kQueries * kRowBytes;
  static constexpr int kScoreRowBytes = kPaddedRowBytes<bf16, kQueries>;  // of dS^T: a row per key
  static constexpr int kScoreBytes = kKeys * kScoreRowBytes;
  static constexpr int kStatsBytes = kQueries * (8 + 4);  // RowStats, then what they lack
  static constexpr int kSharedBytes = 2 * kKeyBytes + 2 * kQueryBytes + kScoreBytes + kStatsBytes;
  static constexpr int kBlocksPerSm = !kSmall ? 1 : kHeadDim <= 80 ? 3 : 2;
  static constexpr bool kPairsBesideSums = kSmall || kHeadDim == 80;
  // Gradients on the way out, as in attention_backward.cuh. They fit where the rows of both tensors of a side were.
  static constexpr int kStagingFloats = kHeadDim % 16 == 8 ? kHeadDim : kHeadDim + 8;
  static_assert(kStagingFloats * 4 <= 2 * kRowBytes);
};

template <int kDim>
struct QueryRowsOut {
  static constexpr int kHeadDim = kDim, kBlocks = 1, kStagingFloats = kDim % 16 == 8 ? kDim : kDim + 8;
};

template <typename T, typename Config>
struct ShortBackward {
  static constexpr int kHeadDim = Config::kHeadDim, kBlocks = Config::kBlocks, kRowBytes = Config::kRowBytes;
  using KeySide = Accumulator<kBlocks, kHeadDim / 8>;
  using QuerySide = Accumulator<1, kHeadDim / 8>;

  const ShortBackwardParams& params;
  char* shared;

  __device__ char* queries() const { return shared + 2 * Config::kKeyBytes; }
  __device__ char* scores() const { return queries() + 2 * Config::kQueryBytes; }
  __device__ RowStats* stats() const { return reinterpret_cast<RowStats*>(scores() + Config::kScoreBytes); }
  __device__ float* lows() const { return reinterpret_cast<float*>(stats() + Config::kQueries); }
  static __device__ int warp() { return threadIdx.x / 32; }
  static __device__ Rows rows_of(const Operand& x, int head) {
    return {elements<T>(x.data) + head * x.stride_head, x.stride_token};
  }

  // Start the copy of keys and values; wait for it with arrive().
  __device__ __forceinline__ void load_keys(int token, int rows, int head) const {
    copy_rows<T, Config>(rows_of(params.v, head), shared_address(shared) + Config::kKeyBytes, token, rows);
    turn_rows<T, Config, Config::kThreads, false>(rows_of(params.k, head), shared, token, rows, head, params.dk.tables,
                                                  threadIdx.x);
  }

  // A chunk of queries, dO and statistics. kPairs: see turn_rows. Rows that do not exist get a softmax denominator of infinity:
  // their P is zero.
  template <bool kPairs>
  __device__ __forceinline__ void load_queries(int token, int rows, int head) const {
    constexpr int kLanes = 8;  // per row
    turn_rows<T, Config, Config::kThreads, kPairs>(rows_of(params.q, head), queries(), token, rows, head, params.dq.tables,
                                                   threadIdx.x);
    const int lane = threadIdx.x % kLanes, padded = (rows + 15) / 16 * 16;
    char* to = queries() + Config::kQueryBytes;
#pragma unroll 1
    for (int first = 0; first < padded; first += Config::kThreads / kLanes) {
      const int row = first + threadIdx.x / kLanes;
      const int64_t at = token + row;
      const uint16_t* out = elements<T>(params.out) + (at * params.dq.heads + head) * kHeadDim;
      const uint16_t* grad =
          elements<T>(params.grad_out.data) + at * params.grad_out.stride_token + head * params.grad_out.stride_head;
      float delta = 0.f;
#pragma unroll
      for (int c = lane * 8; c < kHeadDim; c += kLanes * 8) {
        if (row >= padded) continue;
        Packed<T, 8> o = {}, g = {};
        if (row < rows) {
          o = *reinterpret_cast<const Packed<T, 8>*>(out + c);
          g = *reinterpret_cast<const Packed<T, 8>*>(grad + c);
        }
        *reinterpret_cast<Packed<T, 8>*>(to + row * kRowBytes + c * 2) = g;
        add_product<T>(delta, o, g);
      }
      delta = octet_sum(delta);
      if (lane == 0 && row < padded) {
        RowStats found{kInfinity, 0.f};
        float low = 0.f;
        if (row < rows) {
          const int64_t place = static_cast<int64_t>(head) * params.num_tokens + at;
          if (params.grad_lse != nullptr) delta -= static_cast<float>(params.grad_lse[place]);
          found = row_stats(params.lse[place], delta, low);
        }
        stats()[row] = found;
        lows()[row] = low;
      }
    }
  }

  static __device__ __forceinline__ void arrive() {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }

  // Step 2 for this warp's keys. kSums: dK, dV. store: dS for step 3.
  template <bool kSums>
  __device__ __forceinline__ void weigh(KeySide& dk, KeySide& dv, int keys, int query_rows, bool store) const {
    const int own = warp() * 16 * kBlocks, lane = threadIdx.x % 32;
    if (own >= keys) return;
    const uint32_t base = shared_address(shared);
    RowOperand<T, kHeadDim, kBlocks, false> k(base + own * kRowBytes), v(base + Config::kKeyBytes + own * kRowBytes);
    const uint32_t q = shared_address(queries()), grad = q + Config::kQueryBytes;
    const float scale_log2 = params.scale * kLog2E;
#pragma unroll 1
    for (int at = 0; at < query_rows; at += 16) {
      Accumulator<kBlocks, 2> p, ds;
      multiply_transposed<T, kHeadDim, kBlocks, false, 2>(p, k, q + at * kRowBytes);
      multiply_transposed<T, kHeadDim, kBlocks, false, 2>(ds, v, grad + at * kRowBytes);
      float4 of_columns[2];
      float largest = 0.f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        of_columns[n] = *reinterpret_cast<const float4*>(stats() + at + n * 8 + lane % 4 * 2);
        if (at + n * 8 + lane % 4 * 2 < query_rows) largest = fmaxf(largest, fabsf(of_columns[n].x));
        if (at + n * 8 + lane % 4 * 2 + 1 < query_rows) largest = fmaxf(largest, fabsf(of_columns[n].z));
      }
      const bool exact = __any_sync(0xffffffffu, largest > kHugeLog2);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 both = of_columns[n];
        if (exact) {
          const float2 low = *reinterpret_cast<const float2*>(lows() + at + n * 8 + lane % 4 * 2);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              p[m][n][i] = exact_weight(p[m][n][i], scale_log2, i % 2 == 0 ? both.x : both.z, i % 2 == 0 ? low.x : low.y);
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!exact) p[m][n][i] = exp2_approx(fmaf(p[m][n][i], scale_log2, -(i % 2 == 0 ? both.x : both.z)));
            ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - (i % 2 == 0 ? both.y : both.w));
          }
          if (!store) continue;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = own + m * 16 + i * 8 + lane / 4;  // keys that do not exist must not weigh: 0 * infinity
            *reinterpret_cast<uint32_t*>(scores() + row * Config::kScoreRowBytes + (at + n * 8 + lane % 4 * 2) * 2) =
                row < keys ? pack<T>(ds[m][n][2 * i], ds[m][n][2 * i + 1]) : 0u;
          }
        }
      }
      if constexpr (kSums) {
        multiply_add<T, kHeadDim, kBlocks, 2>(dv, p, grad + at * kRowBytes);
        multiply_add<T, kHeadDim, kBlocks, 2>(dk, ds, q + at * kRowBytes);
      }
    }
  }

  // Step 3: dq += dS K for this warp's 16 rows of the chunk.
  __device__ __forceinline__ void gather(QuerySide& dq, int keys) const {
    uint32_t from = shared_address(scores()) + lane_offset_of_columns<Config::kScoreRowBytes>() + warp() * 32;
    uint32_t columns = shared_address(shared) + lane_offset_of_rows<kRowBytes>();
#pragma unroll 1
    for (int at = 0; at < keys; at += 16, from += 16 * Config::kScoreRowBytes, columns += 16 * kRowBytes) {
      uint32_t a[4];
      load_matrix_x4_transposed<0>(a, from);
      unrolled<kHeadDim / 16>([&](auto n) {
        uint32_t b[4];
        load_matrix_x4_transposed<n * 32>(b, columns);
        mma_k16<T>(dq[0][2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_k16<T>(dq[0][2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      });
      if constexpr (kHeadDim % 16 != 0) {
        uint32_t b[2];
        load_matrix_x2_transposed<kHeadDim / 16 * 32>(b,
                                                      shared_address(shared) + at * kRowBytes + lane_offset_of_half<kRowBytes>());
        mma_k16<T>(dq[0][kHeadDim / 8 - 1], a[0], a[1], a[2], a[3], b[0], b[1]);
      }
    }
  }

  __device__ __forceinline__ void write_queries(const QuerySide& dq, int token, int rows, int head) const {
    const int own = warp() * 16;
    if (own >= rows) return;
    write_gradient<T, QueryRowsOut<kHeadDim>>(params.dq, dq, params.scale,
                                              reinterpret_cast<float*>(queries()) + own * Config::kStagingFloats,
                                              min(16, rows - own), token + own, head, kHeadDim);
  }

  __device__ __forceinline__ void write_keys(const KeySide& dk, const KeySide& dv, int token, int rows, int head) const {
    const int own = warp() * 16 * kBlocks;
    if (own >= rows) return;
    float* staging = reinterpret_cast<float*>(shared) + own * Config::kStagingFloats;
    const int exist = min(16 * kBlocks, rows - own);
    write_gradient<T, Config>(params.dk, dk, params.scale, staging, exist, token + own, head, kHeadDim);
    write_gradient<T, Config>(params.dv, dv, 1.f, staging, exist, token + own, head, kHeadDim);
  }
};

template <typename T, int kHeadDim, int kMostKeys>
__device__ __forceinline__ void attention_short_backward(const ShortBackwardParams& params) {
  using Config = ShortBackwardConfig<kHeadDim, kMostKeys>;
  using Work = ShortBackward<T, Config>;
  constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys;
  extern __shared__ __align__(16) char shared[];
  const Piece piece = find_piece<kKeys>(params.cu_seqlens_k, params.sequences, params.num_tokens_k);
  if (piece.index > 0 && piece.rows <= 0) return;
  const int b = piece.sequence;
  const int query_start = params.cu_seqlens[b];
  const int queries = (b < params.sequences ? params.cu_seqlens[b + 1] : params.num_tokens) - query_start;
  const int key_head = blockIdx.y, first_head = key_head * params.heads_per_key_head;
  const int end_head = first_head + params.heads_per_key_head;
  if (b == params.sequences || queries == 0 || piece.length == 0) {  // nobody meets anybody
    zero_gradient_rows<T, Config::kThreads>(params.dk, piece.rows, piece.row, key_head, kHeadDim);
    zero_gradient_rows<T, Config::kThreads>(params.dv, piece.rows, piece.row, key_head, kHeadDim);
    for (int head = first_head; head < end_head && piece.index == 0; ++head) {
      zero_gradient_rows<T, Config::kThreads>(params.dq, queries, query_start, head, kHeadDim);
    }
    return;
  }

  const Work work{params, shared};
  const bool all_keys = piece.length <= kKeys;  // are here
  typename Work::KeySide dk, dv;
  work.load_keys(piece.row, piece.rows, key_head);
  work.template load_queries<false>(query_start, min(kQueries, queries), first_head);
  fill<Config::kBlocks, kHeadDim / 8>(dk, 0.f);
  fill<Config::kBlocks, kHeadDim / 8>(dv, 0.f);
  for (int head = first_head; head < end_head; ++head) {
    for (int at = 0; at < queries; at += kQueries) {
      const int rows = min(kQueries, queries - at);
      if (head > first_head || at > 0) {  // the sums leave few registers
        work.template load_queries<Config::kPairsBesideSums>(query_start + at, rows, head);
      }
      Work::arrive();
      work.template weigh<true>(dk, dv, piece.rows, rows, all_keys);
      __syncthreads();
      if (all_keys) {
        if (threadIdx.x / 32 * 16 < rows) {
          typename Work::QuerySide dq;
          fill<1, kHeadDim / 8>(dq, 0.f);
          work.gather(dq, piece.rows);
          work.write_queries(dq, query_start + at, rows, head);
        }
        __syncthreads();
      }
    }
  }
  work.write_keys(dk, dv, piece.row, piece.rows, key_head);
  if (all_keys) return;

  const int blocks = (piece.length + kKeys - 1) / kKeys, key_start = piece.row - piece.index * kKeys;
  for (int head = first_head; head < end_head; ++head) {
    for (int at = piece.index * kQueries; at < queries; at += blocks * kQueries) {
      const int rows = min(kQueries, queries - at);
      typename Work::QuerySide dq;
      fill<1, kHeadDim / 8>(dq, 0.f);
      for (int from = 0; from < piece.length; from += kKeys) {
        const int keys = min(kKeys, piece.length - from);
        __syncthreads();
        if (from == 0) work.template load_queries<false>(query_start + at, rows, head);
        work.load_keys(key_start + from, keys, key_head);
        Work::arrive();
        work.template weigh<false>(dk, dv, keys, rows, true);
        __syncthreads();
        if (threadIdx.x / 32 * 16 < rows) work.gather(dq, keys);
      }
      work.write_queries(dq, query_start + at, rows, head);
    }
  }
}

}  // namespace comp_kernels

#define INSTANTIATE_SHORT_BACKWARD(T, kHeadDim, kMostKeys)                                                                   \
  DEFINE_KERNEL(rope_attention_short_backward_##T##_##kHeadDim##_##kMostKeys, ShortBackwardParams, attention_short_backward, \
                short_backward_kernel, (T, kHeadDim, kMostKeys), (ShortBackwardConfig<kHeadDim, kMostKeys>), kKeys,          \
                (ShortBackwardConfig<kHeadDim, kMostKeys>::kBlocksPerSm))
