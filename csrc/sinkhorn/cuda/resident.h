// The kernel of resident.cuh by element type and elements per access (16 bytes' worth, or 1), and what it is launched with.
#pragma once

#include "common/cuda/kernel.h"

namespace comp_kernels {

constexpr int kResidentThreads = 512;
constexpr int kResidentWarps = kResidentThreads / 32;
constexpr int kResidentTile = 128;  // columns of a tile at most

// Rows of a tile that a thread holds at once, with `vec` columns of each.
constexpr int resident_rows_at_once(int vec) { return vec == 8 ? 4 : 8; }

// Where things lie in dynamic shared memory, byte offsets, the same for host and device; first sums of columns, [warps][tile]
// floats or pairs. `padded` rows: a multiple of kResidentThreads / lanes.
struct ResidentShared {
  static constexpr int column_values = kResidentWarps * kResidentTile * 8;  // v and b / c [tile]
  static constexpr int row_values = column_values + kResidentTile * 8;      // u and row sums [padded], or pairs of the rows
  int scores;                                                               // [tiles of the block][resident rows][lanes][kVec]

  __host__ __device__ explicit ResidentShared(int padded) : scores(row_values + padded * 8) {}
};

// Steps of an iteration as launches of their own, `step` of ResidentParams; the plan has the number 4 * iterations.
enum ResidentStep { kSweep, kMergeRows, kRescue, kMergeRescued, kSteps };
constexpr int kAllSteps = -1;  // in one cooperative launch

// Letters: G items, n rows, K columns, B blocks of a team, S teams ("slots"). Grid: (S, B).
struct ResidentParams {
  const void* scores;          // [G, n, K], strides item_stride, row_stride
  const float* row_marginals;  // [n] per item, stride row_marginals_stride (0: shared)
  const float* col_marginals;  // [K] per item, likewise
  float* u;                    // [G, n]: written, natural logarithms
  float* v;                    // [G, K]: written
  float* plan;                 // [G, n, K]: written
  float* u2;                   // [2, G, n] in bits: after the last iteration, and the one before
  float* v2;                   // [2, G, K] likewise
  float* partial;              // [2, S, B, n]: row sums over the columns of a block, of this iteration and the one before
  float2* pairs;               // [S, B, n]: the same as (peak, sum) where a sum is out of range
  float2* errors;              // [2, S B]: L1 error of the column sums of a block, and their marginals' sum
  uint32_t* arrivals;          // [S + 1], zero: of the barriers of a team, and of all blocks
  uint32_t* rescues;           // [S], zero: the last iteration (of all items of the team, from 1) with a row sum out of range
  uint32_t* stopped;           // [1], zero: iterations that were done when tol ended them; 0: all
  int64_t item_stride;  // elements
  int row_stride;       // so that n row_stride is below 2^31
  int64_t row_marginals_stride, col_marginals_stride;
  int items, rows, cols, iterations;
  int team;           // B
  int lane_bits;      // log2 of the threads that share a row of a tile, up to 5
  int padded;         // n rounded up to a multiple of the rows that all threads take at once
  int batches;        // of resident_rows_at_once of those
  int tiles_per_block, larger_blocks;  // tiles of a block; so many, the first, have one more
  // Of each tile, so many steps of 512 >> lane_bits rows are in shared memory, of the first tiles one more; the others are read
  // again.
  int resident_steps, more_resident;
  int merge_all;      // 1: each block merges all rows for itself; 0: its share, with one barrier more
  int step;           // kAllSteps, or iteration * kSteps + a ResidentStep
  float factor;       // log2(e) / epsilon
  // Added to every marginal: 0, or for defaults, whose memory is zeros, the marginal. To ask for a null pointer instead takes
  // registers that the 16-bit kernels do not have.
  float row_each, col_each;
  float tol;          // negative: none
};

template <typename T, int kVec>
Kernel sinkhorn_resident_kernel();

}  // namespace comp_kernels
