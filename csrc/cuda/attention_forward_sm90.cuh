// rope_attention forward for sm_90a: warpgroup products (wgmma) fed by bulk copies, one block per 128 queries of one head.
//
// Schedule of a block of three warpgroups:
//   producer   one thread walks the key tiles; for each it waits until a ring slot is free and starts two bulk copies (keys,
//              values: images made by the previous kernel, one contiguous copy each). Its registers go to the others.
//   consumers  two warpgroups of 64 queries. They turn the queries into shared memory once, then for tile j
//                [0] start S_j = Q K_j^T
//                [1] start O += P_{j-1} V_{j-1}, which runs while
//                [2] S_j has come and becomes P_j in registers (softmax.cuh), and
//                [3] wait for [1], release its slot, P_j takes the place of P_{j-1}.
// The tile that is not full comes last, in steps of 32 keys.
#pragma once

#include "softmax.cuh"
#include "tile_images.cuh"
#include "wgmma.cuh"

namespace comp_kernels {

template <int kHeadDimension>
struct ForwardSm90Config {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kThreads = 384;
  static constexpr int kConsumers = 256;
  static constexpr int kQueries = 128;
  static constexpr int kStages = 2;
  static constexpr int kSteps = (kHeadDim + 15) / 16;  // of 16 channels; the queries are zero beyond kHeadDim
  // Query image: core matrices of 8 rows x 16 bytes, 16 bytes apart so that the threads of a row write to different banks.
  static constexpr int kQueryLeading = 144;
  static constexpr int kQueryStride = 2 * kSteps * kQueryLeading;
  static constexpr int kQueryBytes = kQueries / 8 * kQueryStride;
  static constexpr int kOutputBytes = kQueries * kPaddedRowBytes<kHeadDim>;
  static constexpr int kKeyStride = kHeadDim * 16;  // to the next 8 keys of an image
  static constexpr int kTileBytes = kImageKeys * kHeadDim * 2;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kRing = kBarrierBytes + (kQueryBytes > kOutputBytes ? kQueryBytes : kOutputBytes);
  static constexpr int kSharedBytes = kRing + kStages * 2 * kTileBytes;
};

// Shared-memory addresses of the ring: a slot holds a key tile and a value tile, which come and go on their own.
template <typename Config>
struct Ring {
  uint32_t base;

  enum Half { kKeys = 0, kValues = 1 };
  __device__ uint32_t tile(int stage, Half half) const {
    return base + Config::kRing + (stage * 2 + half) * Config::kTileBytes;
  }
  __device__ uint32_t full(int stage, Half half) const { return base + (stage * 2 + half) * 8; }
  __device__ uint32_t empty(int stage, Half half) const { return base + 64 + (stage * 2 + half) * 8; }
};

template <int kHeadDim>
__device__ __forceinline__ void produce(const ForwardParams& params, const Tile& tile, int key_head) {
  using Config = ForwardSm90Config<kHeadDim>;
  using R = Ring<Config>;
  extern __shared__ __align__(128) char shared[];
  const R ring{shared_address(shared)};
  const int64_t first = key_head * params.k_stride_head + static_cast<int64_t>(tile.other_start) * kImageKeys * kHeadDim;
  for (int j = 0; j * kImageKeys < tile.other_rows; ++j) {
    const int stage = j % Config::kStages, parity = j / Config::kStages & 1;
    const int keys = min(kImageKeys, (tile.other_rows - j * kImageKeys + kImagePadding - 1) / kImagePadding * kImagePadding);
    const uint32_t bytes = keys * kHeadDim * 2;
    const int64_t at = first + static_cast<int64_t>(j) * kImageKeys * kHeadDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto which = static_cast<typename R::Half>(half);
      barrier_wait(ring.empty(stage, which), parity ^ 1);
      barrier_arrive_expecting(ring.full(stage, which), bytes);
      copy_bulk(ring.tile(stage, which), (half == 0 ? params.k : params.v) + at, bytes, ring.full(stage, which));
    }
  }
}

// One warp of a consumer warpgroup: 16 of its 64 queries.
template <typename T, int kHeadDim>
struct ConsumerWarp : SoftmaxRows<T, kHeadDim, 1> {
  using Config = ForwardSm90Config<kHeadDim>;
  static constexpr int kColumns = kImageKeys / 8;
  Ring<Config> ring;
  uint64_t queries;  // descriptor of this warpgroup's rows in the query image

  __device__ ConsumerWarp(uint32_t base, int group, float scale)
      : SoftmaxRows<T, kHeadDim, 1>(scale),
        ring{base},
        queries(matrix_descriptor(base + Config::kBarrierBytes + group * 8 * Config::kQueryStride, Config::kQueryLeading,
                                  Config::kQueryStride)) {}

  // Start s = Q K^T for 8 * kCount keys.
  template <int kCount>
  __device__ __forceinline__ void start_scores(Accumulator<1, kCount>& s, uint32_t keys) {
    wgmma_fence();
    const uint64_t whole = matrix_descriptor(keys, 128, Config::kKeyStride);
    // The second half of the last step, where the queries are zero, reads the first half again: something finite.
    const uint64_t last = kHeadDim % 16 == 0 ? whole : matrix_descriptor(keys, 0, Config::kKeyStride);
#pragma unroll
    for (int k = 0; k < Config::kSteps; ++k) {
      const uint64_t b = advanced(k + 1 < Config::kSteps ? whole : last, k * 256);
      Wgmma<T, kCount * 8>::from_shared(s, advanced(queries, k * 2 * Config::kQueryLeading), b, k > 0);
    }
    wgmma_commit();
  }

  // Start O += P V for 8 * kCount keys.
  template <int kCount>
  __device__ __forceinline__ void start_output(const uint32_t (&p)[kCount / 2][4], uint32_t values) {
    wgmma_fence();
    const uint64_t all = matrix_descriptor(values, Config::kKeyStride, 128);
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      Wgmma<T, kHeadDim>::from_registers(this->accumulator, p[k], advanced(all, k * 2 * Config::kKeyStride));
    }
    wgmma_commit();
  }

  // s -> P in place. Where a score exceeds its row's reference by more than 2^12 (or first), the output so far is waited for
  // and scaled down, and the maximum becomes the reference. Unlike softmax.cuh this looks at every score: to find out from the
  // sums, as there, the scores would have to be kept, and registers are what the pipeline lives on.
  template <int kCount>
  __device__ __forceinline__ void weigh(Accumulator<1, kCount>& s, bool first) {
    float peaks[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float shift = first ? 0.f : this->reference[0][i];
      peaks[i] = -kInfinity;
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[0][n][2 * i + j];
          x = fmaf(x, this->scale_log2, -shift);
          peaks[i] = fmaxf(peaks[i], x);
        }
      }
    }
    if (first || __any_sync(0xffffffffu, fmaxf(peaks[0], peaks[1]) > 12.f)) {
      wgmma_wait<0>();
      pin(this->accumulator);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float peak = first ? quad_max(peaks[i]) : fmaxf(quad_max(peaks[i]), 0.f);
        const float factor = first ? 1.f : exp2_approx(-peak);
        this->reference[0][i] = first ? peak : this->reference[0][i] + peak;
        this->total[0][i] *= factor;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          this->accumulator[0][n][2 * i] *= factor, this->accumulator[0][n][2 * i + 1] *= factor;
        }
#pragma unroll
        for (int n = 0; n < kCount; ++n) s[0][n][2 * i] -= peak, s[0][n][2 * i + 1] -= peak;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[0][n][2 * i + j];
          x = exp2_approx(x);
          this->total[0][i] += x;
        }
      }
    }
  }

  // The left operand of P V. Only between products: it defines registers that one reads.
  template <int kCount>
  __device__ __forceinline__ static void pack_weights(uint32_t (&p)[kCount / 2][4], const Accumulator<1, kCount>& s) {
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&w)[4] = s[0][2 * k + i / 2];
        p[k][i] = pack<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
      }
    }
  }

  __device__ __forceinline__ void release(int stage, typename Ring<Config>::Half half) {
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(stage, half));
  }

  // All keys of the sequence.
  __device__ __forceinline__ void consume(int keys) {
    using R = Ring<Config>;
    const int whole = keys / kImageKeys;
    auto stage_of = [](int j) { return j % Config::kStages; };
    auto parity_of = [](int j) { return j / Config::kStages & 1; };
    Accumulator<1, kColumns> s;
    uint32_t p[kColumns / 2][4] = {};
    for (int j = 0; j < whole; ++j) {
      barrier_wait(ring.full(stage_of(j), R::kKeys), parity_of(j));
      start_scores<kColumns>(s, ring.tile(stage_of(j), R::kKeys));
      if (j > 0) {
        barrier_wait(ring.full(stage_of(j - 1), R::kValues), parity_of(j - 1));
        start_output<kColumns>(p, ring.tile(stage_of(j - 1), R::kValues));
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(s);
      release(stage_of(j), R::kKeys);
      weigh<kColumns>(s, j == 0);
      wgmma_wait<0>();
      pin(this->accumulator);
      pin(p);  // was still being read: what follows may not take its registers before
      if (j > 0) release(stage_of(j - 1), R::kValues);
      pack_weights<kColumns>(p, s);
    }
    if (whole > 0) {
      const int j = whole - 1;
      barrier_wait(ring.full(stage_of(j), R::kValues), parity_of(j));
      start_output<kColumns>(p, ring.tile(stage_of(j), R::kValues));
      wgmma_wait<0>();
      pin(this->accumulator);
    }
    const int rest = keys - whole * kImageKeys;
    if (rest == 0) return;
    barrier_wait(ring.full(stage_of(whole), R::kKeys), parity_of(whole));
    barrier_wait(ring.full(stage_of(whole), R::kValues), parity_of(whole));
    for (int at = 0; at < rest; at += kImagePadding) {
      constexpr int kCount = kImagePadding / 8;
      Accumulator<1, kCount> few;
      uint32_t few_p[kCount / 2][4];
      const uint32_t offset = at / 8 * Config::kKeyStride;
      start_scores<kCount>(few, ring.tile(stage_of(whole), R::kKeys) + offset);
      wgmma_wait<0>();
      pin(few);
      mask_columns<1, kCount>(few, rest - at);
      weigh<kCount>(few, whole == 0 && at == 0);
      pack_weights<kCount>(few_p, few);
      start_output<kCount>(few_p, ring.tile(stage_of(whole), R::kValues) + offset);
      wgmma_wait<0>();
      pin(this->accumulator);
    }
  }
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void attention_forward_sm90(const ForwardParams& params) {
  using Config = ForwardSm90Config<kHeadDim>;
  using R = Ring<Config>;
  extern __shared__ __align__(128) char shared[];
  const Tile tile = params.tiles[blockIdx.x];
  if (tile.rows == 0) return;
  const int head = blockIdx.y, group = threadIdx.x / 128;
  const int groups = tile.rows > 64 ? 2 : 1;  // warpgroups that have queries
  const R ring{shared_address(shared)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      for (const auto half : {R::kKeys, R::kValues}) {
        barrier_init(ring.full(stage, half), 1);
        barrier_init(ring.empty(stage, half), groups * 4);  // every warp that computes
      }
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (group == 0) {
    registers_down_to<24>();
    if (threadIdx.x == 0) produce<kHeadDim>(params, tile, head / params.heads_per_key_head);
    return;
  }
  registers_up_to<240>();
  const int thread = threadIdx.x - 128;
  char* query_image = shared + Config::kBarrierBytes;
  load_queries<T, Config::kQueries, Config::kSteps * 16, Config::kConsumers>(
      params, tile, head, thread, [&](int row, int channel) {
        return reinterpret_cast<uint16_t*>(query_image + (row >> 3) * Config::kQueryStride +
                                           (channel >> 3) * Config::kQueryLeading + (row & 7) * 16) +
               (channel & 7);
      });
  fence_async_proxy();  // of the thread that wrote ...
  named_barrier<1, Config::kConsumers>();
  fence_async_proxy();  // ... and of the one that lets wgmma read what others wrote
  ConsumerWarp<T, kHeadDim> warp(shared_address(shared), group - 1, params.scale);
  if (group <= groups) warp.consume(tile.other_rows);
  named_barrier<1, Config::kConsumers>();  // no one reads the query image any more: it becomes the way out
  const int first = thread / 32 * 16;
  if (first >= tile.rows) return;
  warp.finish(params, query_image + first * kPaddedRowBytes<kHeadDim>, tile.row + first, tile.rows - first, head);
}

}  // namespace comp_kernels

#define INSTANTIATE_FORWARD_SM90(T, kHeadDim)                                                                              \
  extern "C" __global__ void __launch_bounds__(comp_kernels::ForwardSm90Config<kHeadDim>::kThreads, 1)                     \
      rope_attention_forward_sm90_##T##_##kHeadDim(const __grid_constant__ comp_kernels::ForwardParams params) {           \
    comp_kernels::attention_forward_sm90<comp_kernels::T, kHeadDim>(params);                                               \
  }                                                                                                                        \
  template <>                                                                                                              \
  comp_kernels::Kernel comp_kernels::forward_sm90_kernel<comp_kernels::T, kHeadDim>() {                                    \
    using Config = ForwardSm90Config<kHeadDim>;                                                                            \
    return {"rope_attention_forward_sm90_" #T "_" #kHeadDim,                                                               \
            reinterpret_cast<const void*>(rope_attention_forward_sm90_##T##_##kHeadDim), Config::kThreads,                 \
            Config::kSharedBytes, Config::kQueries};                                                                       \
  }
