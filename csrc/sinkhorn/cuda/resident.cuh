// Sinkhorn in one launch: blocks own whole columns, keep their scores on chip, and meet once or twice per iteration.
//
// A team of blocks works on an item, each on some tiles of its columns with all rows. A sweep over a tile sums its columns, which
// gives v, and then its share of the row sums: one read of scores that lie in shared memory, but for the rows that do not fit.
// Row sums go to the other blocks through global memory behind a barrier. After the first iteration
//
//     2^(s_ik factor + u_i + v_k) = P_ik        c_k = sum_i P_ik,  v_k += log2 b_k - log2 c_k        (and so for rows)
//
// no term exceeds a marginal and no maximum is looked for; a sum out of range is taken again by its definition, from the largest
// entry. All sums run in a fixed order. The steps may also be launched one by one, with the same bits: see ResidentStep.
#pragma once

#include "common/cuda/grid_barrier.cuh"
#include "entries.cuh"
#include "resident.h"

namespace comp_kernels {

// Sums of entries of the plan in this range are right: what is lost are terms below 2^-126, or 2^-106 where they were multiplied
// by a ratio of at most kHighestRatio, and 2^20 of them are 2^-26 of the lowest sum.
constexpr float kLowestSum = 0x1p-60f, kHighestSum = 0x1p100f, kHighestRatio = 0x1p20f;
__device__ __forceinline__ bool out_of_range(float sum) { return !(sum >= kLowestSum && sum <= kHighestSum); }

template <typename T, int kVec>
class Resident {
 public:
  __device__ __forceinline__ Resident(const ResidentParams& params, char* shared) : p(params) {
    columns = reinterpret_cast<float*>(shared);
    column_pairs = reinterpret_cast<float2*>(shared);
    tile_v = reinterpret_cast<float*>(shared + ResidentShared::column_values);
    tile_w = tile_v + kResidentTile;
    row_u = reinterpret_cast<float*>(shared + ResidentShared::row_values);
    row_pairs = reinterpret_cast<float2*>(row_u);
    row_sums = row_u + p.padded;
    stored = shared + ResidentShared(p.padded).scores;
  }

  // All steps of this team's items, or one step of one item: the blocks of a cooperative launch meet between steps, those of
  // plain launches end.
  __device__ __forceinline__ void run() {
    const bool all = p.step == kAllSteps;
    const int last = kSteps * p.iterations;
    for (wave = 0; item() < p.items; ++wave) {
      int step = all ? 0 : p.step, end = all ? last : min(step + 1, last), iterations = p.iterations;
      if (all) {
        start_copies();
      } else if (*p.stopped != 0) {
        iterations = *p.stopped, end = step;
      }
#pragma unroll 1
      for (; step < end; ++step) {
        const int iteration = step / kSteps, done = wave * p.iterations + iteration, parity = done & 1;
        switch (step % kSteps) {
          case kSweep:
            sweep(iteration, parity, all && p.merge_all && iteration > 0);
            if (all && p.tol >= 0.f) {  // there is one wave of items then
              grid_barrier(p.arrivals + slots(), (iteration + 1) * gridDim.x * gridDim.y);
            } else if (all) {
              meet();
            }
            break;
          case kMergeRows: {
            if (p.tol >= 0.f && iteration > 0 && within_tolerance(parity)) {
              iterations = iteration, step = end;
              if (!all && block() == 0 && threadIdx.x == 0) *p.stopped = iteration;
              break;
            }
            if (!all && p.merge_all) load_u(iteration);
            bool rescue = merge_rows(iteration, parity, done + 1);
            if (all && !p.merge_all) {
              meet();
              rescue = needs_rescue(done + 1);
            }
            if (all && !rescue) step = iteration * kSteps + kMergeRescued;
            break;
          }
          case kRescue:
            if (all || needs_rescue(done + 1)) sum_rows_as_pairs(iteration);
            if (all) meet();
            break;
          default:
            if (all || needs_rescue(done + 1)) merge_pairs(iteration);
            if (all && !p.merge_all) meet();
        }
      }
      if (all || p.step == last) write_results(iterations);
      __syncthreads();  // before the scores of the next item arrive
    }
  }

 private:
  static constexpr int kRows = resident_rows_at_once(kVec);
  static constexpr int kBytes = kIsFloat<T> ? 4 : 2;

  const ResidentParams& p;
  uint32_t met = 0;  // arrivals at the team's barriers so far
  int wave;  // of items, one per team
  float *row_u, *row_sums, *columns, *tile_v, *tile_w;
  float2 *row_pairs, *column_pairs;
  char* stored;

  // What follows from the numbers of thread and block; registers are dearer than these.
  __device__ __forceinline__ int slot() const { return blockIdx.x; }
  __device__ __forceinline__ int slots() const { return gridDim.x; }
  __device__ __forceinline__ int rank() const { return blockIdx.y; }
  __device__ __forceinline__ int64_t block() const { return static_cast<int64_t>(slot()) * p.team + rank(); }
  __device__ __forceinline__ int item() const { return slot() + wave * slots(); }
  __device__ __forceinline__ int64_t base() const { return item() * p.item_stride; }  // of the item's scores
  __device__ __forceinline__ int tiles() const { return p.tiles_per_block + (rank() < p.larger_blocks ? 1 : 0); }
  __device__ __forceinline__ int tile_col(int tile) const {
    return (rank() * p.tiles_per_block + min(rank(), p.larger_blocks) + tile) * cols_per_tile();
  }
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ int lanes() const { return 1 << p.lane_bits; }  // that share a row
  __device__ __forceinline__ int group() const { return threadIdx.x & (lanes() - 1); }  // this one's columns of a tile
  __device__ __forceinline__ int own_row() const { return threadIdx.x >> p.lane_bits; }  // and row of each step
  __device__ __forceinline__ int step_rows() const { return kResidentThreads >> p.lane_bits; }  // that all threads take at once
  __device__ __forceinline__ int cols_per_tile() const { return kVec << p.lane_bits; }

  // Wait for the team.
  __device__ __forceinline__ void meet() {
    if (p.team > 1) {
      grid_barrier(p.arrivals + slot(), met += p.team);
    } else {
      __syncthreads();
    }
  }

  // The n-th column of a tile as threads sum it: neighbouring threads, neighbouring banks.
  __device__ __forceinline__ int place(int c) const { return c * lanes() + group(); }
  __device__ __forceinline__ int col_in_tile(int place) const { return (place & (lanes() - 1)) * kVec + (place >> p.lane_bits); }

  __device__ __forceinline__ float* u2_of(int iterations) const {
    return p.u2 + (static_cast<int64_t>(iterations & 1) * p.items + item()) * p.rows;
  }
  __device__ __forceinline__ float* v2_of(int iterations) const {
    return p.v2 + (static_cast<int64_t>(iterations & 1) * p.items + item()) * p.cols;
  }
  __device__ __forceinline__ float row_marginal(int row) const {
    return p.row_marginals[item() * p.row_marginals_stride + row] + p.row_each;
  }
  __device__ __forceinline__ float col_marginal(int col) const {
    return p.col_marginals[item() * p.col_marginals_stride + col] + p.col_each;
  }
  // Rows of a tile in shared memory, and the first of its chunks there.
  __device__ __forceinline__ int resident_rows(int tile) const {
    return (p.resident_steps + (tile < p.more_resident ? 1 : 0)) * step_rows();
  }
  __device__ __forceinline__ int first_chunk(int tile) const {
    return (tile * p.resident_steps + min(tile, p.more_resident)) * kResidentThreads;
  }
  __device__ __forceinline__ int chunk_of(int tile, int row) const { return first_chunk(tile) + row * lanes() + group(); }

  // --- scores ---

  __device__ __forceinline__ void start_copies() {
#pragma unroll 1
    for (int tile = 0; tile < tiles(); ++tile) {
      const int col = tile_col(tile) + group() * kVec;
#pragma unroll 1
      for (int row = own_row(); row < resident_rows(tile); row += step_rows()) {
        const bool there = row < p.rows && col < p.cols;
        if constexpr (kVec == 1) {
          Chunk<T, 1> chunk{};
          if (there) chunk.load_global(p.scores, base() + row * p.row_stride + col);
          reinterpret_cast<typename Chunk<T, 1>::Stored*>(stored)[chunk_of(tile, row)] = chunk.bits;
        } else {
          const int64_t at = there ? base() + row * p.row_stride + col : 0;
          copy_async_16<0>(shared_address(stored) + chunk_of(tile, row) * 16, static_cast<const char*>(p.scores) + at * kBytes,
                           there ? 16 : 0);
        }
      }
      if constexpr (kVec > 1) copy_async_commit();
    }
  }

  // Until this thread's own copies of a tile have come; it reads no others before the plan.
  __device__ __forceinline__ void wait_for_copies(int tile) {
    if constexpr (kVec > 1) {
      switch (tiles() - 1 - tile) {
        case 0: copy_async_wait<0>(); break;
        case 1: copy_async_wait<1>(); break;
        case 2: copy_async_wait<2>(); break;
        case 3: copy_async_wait<3>(); break;
        case 4: copy_async_wait<4>(); break;
        case 5: copy_async_wait<5>(); break;
        case 6: copy_async_wait<6>(); break;
        default: copy_async_wait<7>();
      }
    }
  }

  // x[r]: scores times the factor of this thread in rows (batch * kRows + r) * step_rows() + own_row(); 0 where nothing is.
  __device__ __forceinline__ void load(float (&x)[kRows][kVec], int tile, int batch) const {
    Chunk<T, kVec> chunks[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) chunks[r] = {};
    const int col = tile_col(tile) + group() * kVec, row = batch * kRows * step_rows() + own_row();
    const int chunk = first_chunk(tile) + batch * kRows * kResidentThreads + threadIdx.x, resident = resident_rows(tile);
    const int64_t first_score = base() + col;
    int at = row * p.row_stride;  // below 2^31, as the host has seen to
    each_row(batch, [&](auto r, int first) {
      if (first < resident) {
        chunks[r].load_shared(stored, chunk + r * kResidentThreads);
      } else if (first + own_row() < p.rows && col < p.cols) {
        chunks[r].load_global(p.scores, first_score + at);
      }
      at += step_rows() * p.row_stride;
    });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      chunks[r].to_floats(x[r]);
#pragma unroll
      for (int c = 0; c < kVec; ++c) x[r][c] = __fmul_rn(x[r][c], p.factor);
    }
  }

  // body(r, first row of the step) for the steps of a batch that have rows.
  template <typename Body>
  __device__ __forceinline__ void each_row(int batch, Body body) const {
    unrolled<kRows>([&](auto r) {
      const int first = (batch * kRows + r) * step_rows();
      if (first < p.padded) body(r, first);
    });
  }

  // --- sweep: columns ---

  // row_u: u after the last iteration, -infinity in rows that are not there. Threads then wait for each other.
  __device__ __forceinline__ void load_u(int iteration) {
    const float* u2 = u2_of(iteration);
    for (int row = threadIdx.x; row < p.padded; row += kResidentThreads) {
      float u = -kInfinity;
      if (row < p.rows) u = iteration > 0 ? __ldcg(u2 + row) : row_marginal(row) == 0.f ? -kInfinity : 0.f;
      row_u[row] = u;
    }
    __syncthreads();
  }

  // v2, row sums of this block in `partial`, and with tol errors. has_u: row_u is there already.
  __device__ __forceinline__ void sweep(int iteration, int parity, bool has_u) {
    if (!has_u) load_u(iteration);
    const bool one_batch = p.batches == 1;
    float error = 0.f, own_sums[kRows] = {};
#pragma unroll 1
    for (int tile = 0; tile < tiles(); ++tile) {
      if (iteration == 0 && p.step == kAllSteps) wait_for_copies(tile);
      float x[kRows][kVec];
      const bool held = sum_columns(x, tile, iteration, error) && one_batch;  // x: entries of the plan before the scaling
      sum_rows(x, tile, held, own_sums);
    }
    if (one_batch) add_row_sums(own_sums, 0, true);
    __syncthreads();
    float* partial = p.partial + (static_cast<int64_t>(parity * slots() + slot()) * p.team + rank()) * p.rows;
    for (int row = threadIdx.x; row < p.rows; row += kResidentThreads) partial[row] = row_sums[row];
    if (p.tol >= 0.f) {
      float mass = 0.f;
      for (int tile = 0; tile < tiles(); ++tile) mass += Column(*this, tile).marginal;
      error = block_sum(error), mass = block_sum(mass);
      if (threadIdx.x == 0) p.errors[parity * static_cast<int64_t>(slots()) * p.team + block()] = float2{error, mass};
    }
  }

  // v of a tile's columns, in v2, tile_v and, as b / c, tile_w. Whether x now holds 2^(entry + u + old v) of the last batch.
  __device__ __forceinline__ bool sum_columns(float (&x)[kRows][kVec], int tile, int iteration, float& error) {
    bool from_plan = iteration > 0;
    if (from_plan) {
      sum_entries_of_plan(x, tile, iteration);
      const Column own(*this, tile);
      float sum = 0.f, v = -kInfinity, ratio = 0.f;
      if (own.marginal != 0.f) v = v2_of(iteration)[own.col];
      __syncthreads();
      if (own.marginal != 0.f) {
#pragma unroll
        for (int w = 0; w < kResidentWarps; ++w) sum += columns[w * kResidentTile + threadIdx.x];
        v += __log2f(own.marginal) - __log2f(sum);
        ratio = __fdiv_rn(own.marginal, sum);
      }
      if (own.in_tile >= 0) tile_w[own.in_tile] = ratio;
      set_v(own, v, iteration);
      from_plan = !__syncthreads_or(own.marginal != 0.f && (out_of_range(sum) || ratio > kHighestRatio));
      if (from_plan) error += fabsf(sum - own.marginal);
    }
    if (!from_plan) {
      sum_column_pairs(x, tile);
      __syncthreads();
      const Column own(*this, tile);
      float sum = 0.f, v = -kInfinity;
      if (own.marginal != 0.f) {
        LogSum all;
#pragma unroll
        for (int w = 0; w < kResidentWarps; ++w) all.add(LogSum(column_pairs[w * kResidentTile + threadIdx.x]));
        v = potential(own.marginal, all.log2());
        if (iteration > 0) sum = exp2_approx(all.log2() + v2_of(iteration)[own.col]);
      }
      set_v(own, v, iteration);
      error += fabsf(sum - own.marginal);
      __syncthreads();
    }
    return from_plan;
  }

  // The column of a tile whose potential this thread computes.
  struct Column {
    int col, in_tile = -1;  // in_tile: -1 for threads that have none
    float marginal = 0.f;   // 0 beyond the last column too

    __device__ __forceinline__ Column(const Resident& block, int tile) {
      const int place = threadIdx.x;
      if (place >= block.cols_per_tile()) return;
      in_tile = block.col_in_tile(place), col = block.tile_col(tile) + in_tile;
      if (col < block.p.cols) marginal = block.col_marginal(col);
    }
  };

  __device__ __forceinline__ void set_v(const Column& column, float v, int iteration) {
    if (column.in_tile < 0) return;
    tile_v[column.in_tile] = v;
    if (column.col < p.cols) v2_of(iteration + 1)[column.col] = v;
  }

  // columns [warps][tile]: sums over the rows of a warp() of 2^(entry + u + v).
  __device__ __forceinline__ void sum_entries_of_plan(float (&x)[kRows][kVec], int tile, int iteration) {
    const int col = tile_col(tile) + group() * kVec;
    float v[kVec], sums[kVec] = {};
#pragma unroll
    for (int c = 0; c < kVec; ++c) v[c] = -kInfinity;
    if (col < p.cols) load_potentials<kVec>(v, v2_of(iteration) + col);
#pragma unroll 1
    for (int batch = 0; batch < p.batches; ++batch) {
      load(x, tile, batch);
      each_row(batch, [&](auto r, int first) {
        const float u = row_u[first + own_row()];
#pragma unroll
        for (int c = 0; c < kVec; ++c) {
          x[r][c] = exp2_approx(__fadd_rn(__fadd_rn(x[r][c], u), v[c]));
          sums[c] += x[r][c];
        }
      });
    }
    for (int step = lanes(); step < 32; step *= 2) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], step);
    }
    if (lane() < lanes()) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) columns[warp() * kResidentTile + place(c)] = sums[c];
    }
  }

  // column_pairs [warps][tile]: the same of 2^(entry + u), as (peak, sum).
  __device__ __forceinline__ void sum_column_pairs(float (&x)[kRows][kVec], int tile) {
    LogSum own[kVec];
#pragma unroll 1
    for (int batch = 0; batch < p.batches; ++batch) {
      load(x, tile, batch);
      unrolled<kRows>([&](auto r) {
        const int first = (batch * kRows + r) * step_rows();
        const float u = first < p.padded ? row_u[first + own_row()] : -kInfinity;
#pragma unroll
        for (int c = 0; c < kVec; ++c) x[r][c] = __fadd_rn(x[r][c], u);
      });
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
        float column[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) column[r] = x[r][c];
        own[c].add(column);
      }
    }
    for (int step = lanes(); step < 32; step *= 2) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) own[c].add(of_lane(own[c], step));
    }
    if (lane() < lanes()) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) column_pairs[warp() * kResidentTile + place(c)] = own[c].pair();
    }
  }

  static __device__ __forceinline__ LogSum of_lane(const LogSum& own, int step) {
    return LogSum(float2{__shfl_xor_sync(0xffffffffu, own.peak, step), __shfl_xor_sync(0xffffffffu, own.sum, step)});
  }

  // --- sweep: rows ---

  // A tile's share of the row sums with v as it now is: in own_sums where all rows are in one batch, else in row_sums. held: x
  // has the entries of the plan before their columns were scaled.
  __device__ __forceinline__ void sum_rows(float (&x)[kRows][kVec], int tile, bool held, float (&own_sums)[kRows]) {
    if (held) {
      float w[kVec];
      load_potentials<kVec>(w, tile_w + group() * kVec);
      each_row(0, [&](auto r, int) {
#pragma unroll
        for (int c = 0; c < kVec; ++c) own_sums[r] += x[r][c] * w[c];
      });
      return;
    }
    float v[kVec];
    load_potentials<kVec>(v, tile_v + group() * kVec);
#pragma unroll 1
    for (int batch = 0; batch < p.batches; ++batch) {
      load(x, tile, batch);
      each_row(batch, [&](auto r, int first) {
        const float u = row_u[first + own_row()];
#pragma unroll
        for (int c = 0; c < kVec; ++c) own_sums[r] += exp2_approx(__fadd_rn(__fadd_rn(x[r][c], u), v[c]));
      });
      if (p.batches > 1) add_row_sums(own_sums, batch, tile == 0);
    }
  }

  // Over the threads that share a row; each row always has the same ones, so none waits for another. own_sums are zero then.
  __device__ __forceinline__ void add_row_sums(float (&own_sums)[kRows], int batch, bool first_tile) {
    each_row(batch, [&](auto r, int first) {
      float sum = own_sums[r];
      for (int step = lanes() / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      const int row = first + own_row();
      if (group() == 0) row_sums[row] = first_tile ? sum : row_sums[row] + sum;
      own_sums[r] = 0.f;
    });
  }

  __device__ __forceinline__ float block_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    __syncthreads();
    if (lane() == 0) columns[warp()] = x;
    __syncthreads();
    float sum = 0.f;
    for (int w = 0; w < kResidentWarps; ++w) sum += columns[w];
    return sum;
  }

  // Whether the last iteration left the columns of every item() within tol of their marginals: the same answer in all blocks.
  __device__ __forceinline__ bool within_tolerance(int parity) const {
    bool within = true;
    for (int i = warp(); i < p.items; i += kResidentWarps) {
      const float2* errors = p.errors + (parity * static_cast<int64_t>(slots()) + i) * p.team;
      float error = 0.f, mass = 0.f;
      for (int b = lane(); b < p.team; b += 32) {
        const float2 pair = __ldcg(errors + b);
        error += pair.x, mass += pair.y;
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        error += __shfl_xor_sync(0xffffffffu, error, step), mass += __shfl_xor_sync(0xffffffffu, mass, step);
      }
      within = within && error <= p.tol * mass;
    }
    return __syncthreads_and(within);
  }

  // --- rows over the team ---

  __device__ __forceinline__ int first_merged_row(int of) const {
    return p.merge_all ? 0 : static_cast<int>(static_cast<int64_t>(of) * p.rows / p.team);
  }
  __device__ __forceinline__ int end_of_merged_rows() const { return p.merge_all ? p.rows : first_merged_row(rank() + 1); }

  __device__ __forceinline__ void set_u(int row, float u, int iteration) {
    if (p.merge_all) row_u[row] = u;
    if (!p.merge_all || rank() == 0) u2_of(iteration + 1)[row] = u;
  }

  // u of all rows, in row_u and u2, or of this block's share, in u2, from the sums of all blocks: eight warps' loads per row side
  // by side where there are few rows. Whether one is out of range, which `rescues` then tells the others.
  __device__ __forceinline__ bool merge_rows(int iteration, int parity, uint32_t tag) {
    const int begin = first_merged_row(rank()), end = end_of_merged_rows(), groups = (end - begin + 31) / 32;
    int parts = kResidentWarps;
    while (parts > 1 && groups * parts > kResidentWarps) parts /= 2;
    const int at_once = kResidentWarps / parts, own_group = warp() % at_once, part = warp() / at_once;
    const float* partial = p.partial + static_cast<int64_t>(parity * slots() + slot()) * p.team * p.rows;
    bool wrong = false;
    for (int first = 0; first < groups; first += at_once) {
      const int row = begin + (first + own_group) * 32 + lane();
      float sum = 0.f;
      if (row < end) {
#pragma unroll 2
        for (int b = part; b < p.team; b += parts) sum += __ldcg(partial + static_cast<int64_t>(b) * p.rows + row);
      }
      columns[threadIdx.x] = sum;
      __syncthreads();
      if (part == 0 && row < end) {
        for (int other = 1; other < parts; ++other) sum += columns[threadIdx.x + other * at_once * 32];
        const float marginal = row_marginal(row);
        if (marginal == 0.f) {
          set_u(row, -kInfinity, iteration);
        } else {
          const float old = p.merge_all ? row_u[row] : iteration > 0 ? __ldcg(u2_of(iteration) + row) : 0.f;
          set_u(row, old + (__log2f(marginal) - __log2f(sum)), iteration);
          wrong = wrong || out_of_range(sum);
        }
      }
      __syncthreads();
    }
    const bool rescue = __syncthreads_or(wrong);
    if (rescue && threadIdx.x == 0) p.rescues[slot()] = tag;
    return rescue;
  }

  __device__ __forceinline__ bool needs_rescue(uint32_t tag) const { return __ldcg(p.rescues + slot()) == tag; }

  // `pairs`: of 2^(entry + v) over the columns of this block, for all rows. Takes the place of row_u.
  __device__ __forceinline__ void sum_rows_as_pairs(int iteration) {
#pragma unroll 1
    for (int tile = 0; tile < tiles(); ++tile) {
      const int col = tile_col(tile) + group() * kVec;
      float v[kVec];
      if (col < p.cols) load_potentials<kVec>(v, v2_of(iteration + 1) + col);
#pragma unroll 1
      for (int row = own_row(); row < p.padded; row += step_rows()) {
        LogSum own;
        if (row < p.rows && col < p.cols) {
          Chunk<T, kVec> chunk;
          if (row < resident_rows(tile)) {
            chunk.load_shared(stored, chunk_of(tile, row));
          } else {
            chunk.load_global(p.scores, base() + row * p.row_stride + col);
          }
          float x[kVec];
          chunk.to_floats(x);
#pragma unroll
          for (int c = 0; c < kVec; ++c) x[c] = entry(x[c], p.factor, v[c]);
          own.add(x);
        }
        for (int step = lanes() / 2; step > 0; step /= 2) own.add(of_lane(own, step));
        if (group() == 0) {
          if (tile > 0) own.add(LogSum(row_pairs[row]));
          row_pairs[row] = own.pair();
        }
      }
    }
    __syncthreads();
    float2* pairs = p.pairs + (block()) * p.rows;
    for (int row = threadIdx.x; row < p.rows; row += kResidentThreads) pairs[row] = row_pairs[row];
  }

  __device__ __forceinline__ void merge_pairs(int iteration) {
    const float2* pairs = p.pairs + static_cast<int64_t>(slot()) * p.team * p.rows;
    for (int row = first_merged_row(rank()) + threadIdx.x; row < end_of_merged_rows(); row += kResidentThreads) {
      LogSum all;
      for (int b = 0; b < p.team; ++b) all.add(LogSum(__ldcg(pairs + static_cast<int64_t>(b) * p.rows + row)));
      set_u(row, potential(row_marginal(row), all.log2()), iteration);
    }
    for (int row = p.rows + threadIdx.x; row < p.padded; row += kResidentThreads) row_u[row] = -kInfinity;
    __syncthreads();
  }

  // --- results ---

  // u, v and the plan after so many iterations.
  __device__ __forceinline__ void write_results(int iterations) {
    if (p.step != kAllSteps || !p.merge_all) load_u(iterations);
    if (rank() == 0) {
      for (int row = threadIdx.x; row < p.rows; row += kResidentThreads) {
        p.u[static_cast<int64_t>(item()) * p.rows + row] = row_u[row] * kLn2;
      }
    }
    constexpr int kCols = kVec == 1 ? 1 : 4;  // stores that fill whole sectors
    const int lanes = cols_per_tile() / kCols, step = kResidentThreads / lanes;
    const int own_col = threadIdx.x % lanes * kCols, first_row = threadIdx.x / lanes;
#pragma unroll 1
    for (int tile = 0; tile < tiles(); ++tile) {
      const int col = tile_col(tile) + own_col;
      if (col >= p.cols) continue;
      float v[kCols];
      load_potentials<kCols>(v, v2_of(iterations) + col);
      if (first_row == 0) {
#pragma unroll
        for (int c = 0; c < kCols; ++c) p.v[static_cast<int64_t>(item()) * p.cols + col + c] = v[c] * kLn2;
      }
      for (int row = first_row; row < p.rows; row += step) {
        float x[kCols];
        if (row < resident_rows(tile)) {
          load_scores_shared(x, first_chunk(tile) * kVec + row * cols_per_tile() + own_col);
        } else {
          load_scores<T, kCols>(x, p.scores, base() + row * p.row_stride + col);
        }
        const float u = row_u[row];
#pragma unroll
        for (int c = 0; c < kCols; ++c) x[c] = exp2_approx(entry(x[c], p.factor, u) + v[c]);
        float* plan = p.plan + (static_cast<int64_t>(item()) * p.rows + row) * p.cols + col;
        if constexpr (kCols == 1) {
          plan[0] = x[0];
        } else {
          *reinterpret_cast<float4*>(plan) = float4{x[0], x[1], x[2], x[3]};
        }
      }
    }
  }

  // kCols scores from element `at` of shared memory.
  template <int kCols>
  __device__ __forceinline__ void load_scores_shared(float (&x)[kCols], int at) const {
    if constexpr (kCols == 1) {
      Chunk<T, 1> chunk;
      chunk.load_shared(stored, at);
      chunk.to_floats(x);
    } else if constexpr (kIsFloat<T>) {
      const float4 four = *reinterpret_cast<const float4*>(stored + at * 4);
      x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
      const uint2 four = *reinterpret_cast<const uint2*>(stored + at * 2);
      unpack<T>(four.x, x[0], x[1]);
      unpack<T>(four.y, x[2], x[3]);
    }
  }
};

}  // namespace comp_kernels

#define INSTANTIATE_SINKHORN_RESIDENT(T, kVec)                                                                                     \
  extern "C" __global__ void __launch_bounds__(comp_kernels::kResidentThreads, 1)                                                  \
      sinkhorn_resident_##T##_##kVec(const __grid_constant__ comp_kernels::ResidentParams params) {                                \
    extern __shared__ __align__(16) char resident_shared[];                                                                        \
    comp_kernels::Resident<comp_kernels::T, kVec> block(params, resident_shared);                                                  \
    block.run();                                                                                                                   \
  }                                                                                                                                \
  template <>                                                                                                                      \
  comp_kernels::Kernel comp_kernels::sinkhorn_resident_kernel<comp_kernels::T, kVec>() {                                           \
    return {"sinkhorn_resident_" #T "_" #kVec, reinterpret_cast<const void*>(sinkhorn_resident_##T##_##kVec), kResidentThreads, 0, \
            1};                                                                                                                    \
  }
