// rope_attention forward for sm_90a: warpgroup products (wgmma) fed by bulk copies, one block per tile of queries of one head.
//
// Schedule of a block:
//   producer   one thread of the first warpgroup walks the key tiles; for each it waits until a ring slot is free and starts two
//              bulk copies (keys, values: pieces of images made by the previous kernel). Its registers go to the others. Values
//              that stay where they are come by cp.async of its three other warps.
//   consumers  three warpgroups (two at 128 channels) of 64 queries. They turn the queries into shared memory once, then step j
//                [0] takes its turn: warpgroups start products one after another, so that one's softmax lies under the
//                    products of the others instead of all wanting the same unit at the same time,
//                [1] starts S_j = Q K_j^T and O += P_{j-1} V_{j-1}, passes the turn on,
//                [2] S_j has come and becomes P_j in registers, and
//                [3] waits for O, releases its slot, P_j takes the place of P_{j-1}.
// The last step has as many keys as are left, rounded up to 32, and runs like the others.
//
// The grid may be launched to depend on the kernel that makes the images (kernel.h). Then nothing is listed: blocks find their tiles
// in cu_seqlens themselves, and turn queries and fetch values before they wait. These, cu_seqlens and the tables are inputs of the
// call: kernels before that one wrote them, and it was launched as usual, after their end.
#pragma once

#include "softmax.cuh"
#include "tile_images.cuh"
#include "wgmma.cuh"

namespace comp_kernels {

template <int kHeadDimension>
struct ForwardSm90Config {
  static constexpr int kHeadDim = kHeadDimension;
  // Registers decide: per thread kKeys / 2 scores, kKeys / 4 packed weights, kHeadDim / 2 outputs. Up to 96 channels three
  // warpgroups of 160 registers fit without a spill, with 128 keys at 64 and 72 channels and 96 beyond; 192 rows share what a
  // tile costs to bring from the L2, which 128 rows would keep near its limit.
  static constexpr int kGroups = kHeadDim <= 96 ? 3 : 2;
  static constexpr int kKeys = kHeadDim <= 72 || kHeadDim > 96 ? 128 : 96;  // per step
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : 240;
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kConsumers = 128 * kGroups;
  static constexpr int kQueries = 64 * kGroups;
  static constexpr int kSteps = (kHeadDim + 15) / 16;  // of 16 channels; the queries are zero beyond kHeadDim
  // Query image: core matrices of 8 rows x 16 bytes, 16 bytes apart so that the threads of a row write to different banks.
  static constexpr int kQueryLeading = 144;
  static constexpr int kQueryStride = 2 * kSteps * kQueryLeading;
  static constexpr int kQueryBytes = kQueries / 8 * kQueryStride;
  static constexpr int kOutputBytes = kQueries * kPaddedRowBytes<bf16, kHeadDim>;
  static constexpr int kKeyStride = kHeadDim * 16;  // to the next 8 keys of an image
  static constexpr int kTileBytes = kKeys * kHeadDim * 2;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kRing = kBarrierBytes + (kQueryBytes > kOutputBytes ? kQueryBytes : kOutputBytes);
  static constexpr int kMaxSharedBytes = 227 * 1024;
  static constexpr int kFit = (kMaxSharedBytes - kRing) / (2 * kTileBytes);
  static constexpr int kStages = kFit < 5 ? kFit : 5;
  static constexpr int kSharedBytes = kRing + kStages * 2 * kTileBytes;
  static_assert(kKeys % kImagePadding == 0 && kStages >= 2);
};

struct ForwardSm90Params {
  ForwardParams attention;  // tiles == nullptr: blocks find their own
  const int32_t *cu_seqlens, *cu_seqlens_k;
  int sequences;
  bool values_in_place;  // attention.v is no image but the tensor; only where tiles == nullptr
};

struct FoundTile {
  Tile tile;
  int first_key;  // in the packed tensor
};

// The tile of a block without a list. Tiles of sequence b are those from start / kRows + b on, as with images (tile_images.cuh); some
// between two sequences do not exist. Every warp searches by itself, 32 sequences at a time.
template <int kRows>
__device__ __forceinline__ FoundTile find_tile(const ForwardSm90Params& params, int number) {
  auto first = [&](int b) { return params.cu_seqlens[b] / kRows + b; };
  const int lane = threadIdx.x % 32;
  int b = 0;  // the last sequence (`sequences`: the slack) whose tiles start at `number` or before is among the `span` from b on
  for (int span = params.sequences + 1; span > 1;) {
    const int step = (span + 31) / 32;
    const bool reached = lane * step < span && first(b + lane * step) <= number;
    const int skipped = (__popc(__ballot_sync(0xffffffffu, reached)) - 1) * step;
    b += skipped;
    span = min(step, span - skipped);
  }
  const bool slack = b == params.sequences;
  const int start = params.cu_seqlens[b], end = slack ? params.attention.num_tokens : params.cu_seqlens[b + 1];
  const int row = start + (number - first(b)) * kRows;
  FoundTile found{{row, max(0, min(kRows, end - row)), 0, 0}, 0};
  if (!slack) {
    found.first_key = params.cu_seqlens_k[b];
    found.tile.other_start = first_slot(params.cu_seqlens_k, b);
    found.tile.other_rows = params.cu_seqlens_k[b + 1] - found.first_key;
  }
  return found;
}

// Shared-memory addresses of the ring: a slot holds a key tile and a value tile, which come and go on their own.
template <typename Config>
struct Ring {
  uint32_t base;

  enum Half { kKeys = 0, kValues = 1 };
  __device__ uint32_t tile(int stage, Half half) const { return base + Config::kRing + (stage * 2 + half) * Config::kTileBytes; }
  __device__ uint32_t full(int stage, Half half) const { return base + (stage * 2 + half) * 8; }
  __device__ uint32_t empty(int stage, Half half) const { return base + Config::kBarrierBytes / 2 + (stage * 2 + half) * 8; }
};

// Bring the keys (and values) of one tile of queries, from this position of the ring on.
template <typename Config>
__device__ __forceinline__ void produce(const ForwardParams& params, const Tile& tile, int key_head, bool values,
                                        RingPosition<Config::kStages>& position) {
  constexpr int kHeadDim = Config::kHeadDim;
  using R = Ring<Config>;
  extern __shared__ __align__(128) char ring_memory[];
  const R ring{shared_address(ring_memory)};
  // The images of a sequence follow one another, so a step may take its keys from any multiple of 8 on.
  const int64_t first = key_head * params.k_stride_head + static_cast<int64_t>(tile.other_start) * kImageKeys * kHeadDim;
  for (int key = 0; key < tile.other_rows; key += Config::kKeys, position.advance()) {
    const int stage = position.stage, parity = position.parity;
    const int keys = min(Config::kKeys, (tile.other_rows - key + kImagePadding - 1) / kImagePadding * kImagePadding);
    const uint32_t bytes = keys * kHeadDim * 2;
    const int64_t at = first + static_cast<int64_t>(key) * kHeadDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && !values) continue;
      const auto which = static_cast<typename R::Half>(half);
      barrier_wait(ring.empty(stage, which), parity ^ 1);
      barrier_arrive_expecting(ring.full(stage, which), bytes);
      copy_bulk(ring.tile(stage, which), elements<bf16>(half == 0 ? params.k : params.v) + at, bytes, ring.full(stage, which));
    }
  }
}

// Brings values from the tensor itself, by warps 1 to kValueWarps, into the layout of an image. An instruction copies 8 rows x 4 chunks
// of 16 bytes: whole sectors of global memory, and shared memory without bank conflicts. Rows that do not exist become zeros,
// whatever lies there: their weight is zero, and zero times NaN is none.
constexpr int kValueWarps = 3;
template <typename Config>
struct ValueCopies {
  static constexpr int kHeadDim = Config::kHeadDim, kChunks = kHeadDim / 8;
  // Tiles on their way beside the one that is announced next. wgmma may read them only after a fence of the threads that copied, so
  // they cannot announce themselves; with two more slots than that, one is announced while the tile before it is still in use.
  static constexpr int kAhead = Config::kStages > 4 ? 2 : Config::kStages > 3 ? 1 : 0;
  using R = Ring<Config>;
  R ring;
  RingPosition<Config::kStages> position, landed;
  int groups = 0;  // committed

  // Close the group of a tile, and announce the one kAhead tiles before it.
  __device__ __forceinline__ void next_group() {
    copy_async_commit();
    if (groups++ < kAhead) return;
    copy_async_wait<kAhead>();
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.full(landed.stage, R::kValues));
    landed.advance();
  }

  // The values of one tile of queries: `rest` keys from first_key on.
  __device__ __forceinline__ void copy(const ForwardParams& params, int first_key, int rest, int key_head) {
    const int warp = threadIdx.x / 32 - 1, lane = threadIdx.x % 32, first_row = warp * 8 + lane % 8;
    const int64_t stride = params.v_stride_token;
    const uint16_t* from = elements<bf16>(params.v) + (first_key + first_row) * stride + key_head * params.v_stride_head;
    // Rows of an odd number of chunks may begin in the middle of a sector: then the first instruction takes one chunk, not four.
    const bool halved = kChunks % 2 == 1 && reinterpret_cast<uintptr_t>(from) % 32 != 0;
    const int chunk = lane / 8 - (halved ? 3 : 0);
    from += chunk * 8;
    const uint32_t offset = warp * Config::kKeyStride + chunk * 128 + lane % 8 * 16;
    for (; rest > 0; rest -= Config::kKeys, position.advance()) {
      barrier_wait(ring.empty(position.stage, R::kValues), position.parity ^ 1);
      uint32_t to = ring.tile(position.stage, R::kValues) + offset;
      const int padded = min(Config::kKeys, (rest + kImagePadding - 1) / kImagePadding * kImagePadding);
      const uint16_t* next = from;
#pragma unroll 1  // unrolled it would keep an address for every round, and these threads have few registers
      for (int row = first_row; row < padded; row += kValueWarps * 8) {
        const int bytes = row < rest ? 16 : 0;
        unrolled<(kChunks + 3) / 4>([&](auto four) {
          const int own = four * 4 + chunk;
          if (own < kChunks && (kChunks % 2 == 0 || own >= 0)) copy_async_16<four * 512>(to, next + four * 32, bytes);
        });
        next += kValueWarps * 8 * stride;
        to += kValueWarps * Config::kKeyStride;
      }
      from += Config::kKeys * stride;
      next_group();
    }
  }

  // Announce what is left.
  __device__ __forceinline__ void finish() {
    for (int i = 0; i < kAhead; ++i) next_group();
  }
};

// One warp of a consumer warpgroup: 16 of its 64 queries.
template <typename T, typename Config>
struct ConsumerWarp : SoftmaxRows<T, Config::kHeadDim, 1> {
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kColumns = Config::kKeys / 8;
  using R = Ring<Config>;
  R ring;
  RingPosition<Config::kStages> now;  // of this step's tiles
  int turn, next_turn;  // named barriers: of this warpgroup, and of the one that comes after it
  uint64_t queries;  // descriptor of this warpgroup's rows in the query image

  // query_image: bytes from base to that of the block.
  __device__ ConsumerWarp(uint32_t base, int query_image, int group, int groups, float scale)
      : SoftmaxRows<T, kHeadDim, 1>(scale),
        ring{base},
        turn(kFirstTurn + group),
        next_turn(kFirstTurn + (group + 1 < groups ? group + 1 : 0)),
        queries(matrix_descriptor(base + query_image + group * 8 * Config::kQueryStride, Config::kQueryLeading,
                                  Config::kQueryStride)) {}

  // Start s = Q K^T for 8 * kCount keys.
  template <int kCount>
  __device__ __forceinline__ void start_scores(Accumulator<1, kCount>& s, uint32_t keys) {
    wgmma_fence();
    const StepColumns<kHeadDim> columns(keys, Config::kKeyStride);
#pragma unroll
    for (int k = 0; k < Config::kSteps; ++k) {
      Wgmma<T, kCount * 8>::from_shared(s, advanced(queries, k * 2 * Config::kQueryLeading), columns[k], k > 0);
    }
    wgmma_commit();
  }

  // Start O += P V for 8 * kCount keys.
  template <int kCount>
  __device__ __forceinline__ void start_output(const uint32_t (&p)[kColumns / 2][4], uint32_t values) {
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

  __device__ __forceinline__ void release(int stage, typename R::Half half) {
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(stage, half));
  }

  // Wait for this warpgroup's turn to start products, and pass it on. One warpgroup alone has nobody to wait for. The first one begins
  // without: whoever passed it the turn for that could do so while others still take turns in the tile before (persistent_sm90.cuh),
  // and two turns passed at once are one lost.
  __device__ __forceinline__ void take_turn() {
    if (turn != next_turn) named_barrier_sync(turn, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if (turn != next_turn) named_barrier_arrive(next_turn, 256);
  }

  // One step of 8 * kCount keys, of which `rest` exist. p holds the weights of the step before (kColumns columns) and then of
  // this one. final: nobody waits for the turn of the last warpgroup any more.
  template <int kCount>
  __device__ __forceinline__ void step(uint32_t (&p)[kColumns / 2][4], bool first, bool final, int rest) {
    Accumulator<1, kCount> s;
    barrier_wait(ring.full(now.stage, R::kKeys), now.parity);
    if (!first || turn != kFirstTurn) take_turn();
    start_scores<kCount>(s, ring.tile(now.stage, R::kKeys));
    const bool pass = !final || next_turn != kFirstTurn;
    if (first) {  // each branch starts and waits: the compiler must see which products are under way
      if (pass) pass_turn();
      wgmma_wait<0>();
    } else {
      const auto before = now.before();
      barrier_wait(ring.full(before.stage, R::kValues), before.parity);
      start_output<kColumns>(p, ring.tile(before.stage, R::kValues));
      if (pass) pass_turn();
      wgmma_wait<1>();
    }
    pin(s);
    release(now.stage, R::kKeys);
    if (rest < 8 * kCount) mask_columns<1, kCount>(s, rest, this->scale_log2);
    weigh<kCount>(s, first);
    wgmma_wait<0>();
    pin(this->accumulator);
    pin(p);  // was still being read: what follows may not take its registers before
    if (!first) release(now.before().stage, R::kValues);
    pack_left<T, kCount>(p, s);
  }

  // The output of the last step, which no later step overlaps.
  template <int kCount>
  __device__ __forceinline__ void finish_output(uint32_t (&p)[kColumns / 2][4]) {
    barrier_wait(ring.full(now.stage, R::kValues), now.parity);
    start_output<kCount>(p, ring.tile(now.stage, R::kValues));
    wgmma_wait<0>();
    pin(this->accumulator);
    pin(p);
  }

  template <int kCount>
  __device__ __forceinline__ void last_step(uint32_t (&p)[kColumns / 2][4], bool first, int rest) {
    step<kCount>(p, first, true, rest);
    finish_output<kCount>(p);
  }

  // The keys of a tile in which this warp has no queries: the slots are released all the same.
  __device__ __forceinline__ void let_pass(int keys) {
    for (int key = 0; key < keys; key += Config::kKeys) {
      if (key > 0) now.advance();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto which = static_cast<typename R::Half>(half);
        barrier_wait(ring.full(now.stage, which), now.parity);
        release(now.stage, which);
      }
    }
  }

  // All keys of the sequence.
  __device__ __forceinline__ void consume(int keys) {
    if (keys == 0) return;
    // Steps of the loop. Its last one may lack up to kImagePadding - 1 keys; more than that, and it comes after it, shorter.
    const int whole = (keys + kImagePadding - 1) / Config::kKeys;
    const int rest = keys - whole * Config::kKeys;
    uint32_t p[kColumns / 2][4] = {};
    for (int j = 0; j < whole; ++j) {
      if (j > 0) now.advance();
      step<kColumns>(p, j == 0, rest <= 0 && j + 1 == whole, keys - j * Config::kKeys);
    }
    if (rest <= 0) return finish_output<kColumns>(p);
    if (whole > 0) now.advance();
    const int columns = (rest + kImagePadding - 1) / kImagePadding;
    if (columns == 1) return last_step<4>(p, whole == 0, rest);
    if (columns == 2) return last_step<8>(p, whole == 0, rest);
    if constexpr (kColumns > 12) last_step<12>(p, whole == 0, rest);
  }
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void attention_forward_sm90(const ForwardSm90Params& all) {
  using Config = ForwardSm90Config<kHeadDim>;
  using R = Ring<Config>;
  extern __shared__ __align__(128) char ring_memory[];
  const ForwardParams& params = all.attention;
  const FoundTile found =
      params.tiles != nullptr ? FoundTile{params.tiles[blockIdx.x], 0} : find_tile<Config::kQueries>(all, blockIdx.x);
  const Tile& tile = found.tile;
  if (tile.rows == 0) return wait_for_grid_before();
  const int head = blockIdx.y;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for the whole warp, and the compiler knows it
  const int groups = (tile.rows + 63) / 64;  // warpgroups that have queries
  const R ring{shared_address(ring_memory)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      for (const auto half : {R::kKeys, R::kValues}) {
        barrier_init(ring.full(stage, half), half == R::kValues && all.values_in_place ? kValueWarps : 1);
        barrier_init(ring.empty(stage, half), groups * 4);  // every warp that computes
      }
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (group == 0) {
    registers_down_to<Config::kProducerRegisters>();
    const int key_head = head / params.heads_per_key_head;
    if (threadIdx.x == 0) {
      wait_for_grid_before();
      RingPosition<Config::kStages> start;
      produce<Config>(params, tile, key_head, !all.values_in_place, start);
    } else if (threadIdx.x >= 32 && all.values_in_place) {
      ValueCopies<Config> copies{ring};
      copies.copy(params, found.first_key, tile.other_rows, key_head);
      copies.finish();
    }
    return;
  }
  registers_up_to<Config::kConsumerRegisters>();
  const int thread = threadIdx.x - 128;
  char* query_image = ring_memory + Config::kBarrierBytes;
  load_queries<T, Config::kQueries, Config::kSteps * 16, Config::kConsumers, true>(
      params, tile, head, thread, [&](int row, int channel) {
        return reinterpret_cast<uint16_t*>(query_image + (row >> 3) * Config::kQueryStride +
                                           (channel >> 3) * Config::kQueryLeading + (row & 7) * 16) +
               (channel & 7);
      });
  wait_for_grid_before();  // this thread is going to write
  fence_async_proxy();  // of the thread that wrote ...
  named_barrier<1, Config::kConsumers>();
  fence_async_proxy();  // ... and of the one that lets wgmma read what others wrote
  ConsumerWarp<T, Config> warp(shared_address(ring_memory), Config::kBarrierBytes, group - 1, groups, params.scale);
  if (group <= groups) warp.consume(tile.other_rows);
  named_barrier<1, Config::kConsumers>();  // no one reads the query image any more: it becomes the way out
  const int first = thread / 32 * 16;
  if (first >= tile.rows) return;
  warp.finish(params, query_image + first * kPaddedRowBytes<bf16, kHeadDim>, tile.row + first, tile.rows - first, head);
}

}  // namespace comp_kernels

#define INSTANTIATE_FORWARD_SM90(T, kHeadDim)                                                                                 \
  DEFINE_KERNEL(rope_attention_forward_sm90_##T##_##kHeadDim, ForwardSm90Params, attention_forward_sm90, forward_sm90_kernel, \
                (T, kHeadDim), (ForwardSm90Config<kHeadDim>), kQueries, 1)
