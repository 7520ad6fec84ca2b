// C entry points of sinkhorn on CUDA: check, lay out the workspace, fill the kernels' params, launch. No device code.
#include "comp_kernels/sinkhorn.h"

#include <algorithm>
#include <cstdint>

#include "comp_kernels/export.h"
#include "passes.cuh"
#include "split.h"

namespace comp_kernels {
namespace {

using Params = comp_kernels_sinkhorn_params;

struct Kernels {
  Kernel columns, rows, plan;
  int vec;
};

template <typename T, int kVec>
Kernels kernels_of() {
  return {sinkhorn_columns_kernel<T, kVec>(), sinkhorn_rows_kernel<T, kVec>(), sinkhorn_plan_kernel<T, kVec>(), kVec};
}

template <typename T>
Kernels kernels_of(const Params& p) {
  constexpr int kVec = kScoresPerAccess<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(p.scores) % 16 == 0 && p.row_stride % kVec == 0 && p.item_stride % kVec == 0 &&
                       p.num_cols % kVec == 0;
  return aligned ? kernels_of<T, kVec>() : kernels_of<T, 1>();
}

Kernels kernels_of(const Params& p) {
  if (p.dtype == COMP_KERNELS_FLOAT32) return kernels_of<fp32>(p);
  return p.dtype == COMP_KERNELS_BFLOAT16 ? kernels_of<bf16>(p) : kernels_of<fp16>(p);
}

int64_t column_blocks(const Params& p, int vec) { return (p.num_cols + 32 * vec - 1) / (32 * vec); }

// The rows of a column pass are split so that some four blocks per multiprocessor of a large device have work.
int64_t chunks_of(const Params& p, int vec) {
  constexpr int64_t kBlocksWanted = 512, kRowsWorthABlock = 64;
  const int64_t blocks = std::max<int64_t>(1, column_blocks(p, vec) * p.num_items);
  return std::max<int64_t>(1, std::min(kBlocksWanted / blocks, p.num_rows / kRowsWorthABlock));
}

float col_share(const Params& p) { return static_cast<float>(static_cast<double>(p.num_rows) / static_cast<double>(p.num_cols)); }

const char* check(const Params& p) {
  if (p.dtype == COMP_KERNELS_FLOAT64) return failure("dtype must be float32, bfloat16 or float16, got float64");
  if (std::max({p.num_items, p.num_rows, p.num_cols}) > INT32_MAX / 2) {
    return failure("at most %d items, rows or columns", INT32_MAX / 2);
  }
  if (p.num_iters > INT32_MAX / 8) return failure("at most %d iterations", INT32_MAX / 8);
  return nullptr;
}

SinkhornParams params_of(const Params& p, int vec) {
  SinkhornParams params{};
  params.scores = p.scores;
  params.row_marginals = static_cast<const float*>(p.row_marginals);
  params.col_marginals = static_cast<const float*>(p.col_marginals);
  params.item_stride = p.item_stride, params.row_stride = p.row_stride;
  params.row_marginals_stride = p.row_marginals_stride, params.col_marginals_stride = p.col_marginals_stride;
  params.rows = static_cast<int>(p.num_rows), params.cols = static_cast<int>(p.num_cols);
  params.chunks = static_cast<int>(chunks_of(p, vec));
  params.chunk_rows = static_cast<int>((p.num_rows + params.chunks - 1) / params.chunks);
  params.factor = static_cast<float>(p.factor), params.col_share = col_share(p);
  return params;
}

const char* launch_columns(const Params& p, const Kernels& kernels, const SinkhornParams& params, void* stream) {
  const char* wrong = launch(kernels.columns, column_blocks(p, kernels.vec), p.num_items * params.chunks, params, stream);
  if (wrong != nullptr) return wrong;
  return launch(sinkhorn_merge_kernel(), (p.num_cols + kSinkhornThreads - 1) / kSinkhornThreads, p.num_items, params, stream);
}

int64_t partial_count(const Params& p) { return p.num_items * chunks_of(p, kernels_of(p).vec) * p.num_cols; }

// --- solve: the resident kernel where it serves, passes elsewhere ---

template <typename T>
Kernel resident_kernel(int vec) {
  return vec == 1 ? sinkhorn_resident_kernel<T, 1>() : sinkhorn_resident_kernel<T, kScoresPerAccess<T>>();
}

Kernel resident_kernel(const Params& p, int vec) {
  if (p.dtype == COMP_KERNELS_FLOAT32) return resident_kernel<fp32>(vec);
  return p.dtype == COMP_KERNELS_BFLOAT16 ? resident_kernel<bf16>(vec) : resident_kernel<fp16>(vec);
}

// nanoseconds 0: passes are to serve. They split rows too, which few columns of much data need.
Split split_of(const Params& p) {
  if (p.num_rows * p.row_stride > INT32_MAX / 2) return {};
  constexpr int64_t kMostBytesOfFewBlocks = 512 * 1024;
  const int vec = kernels_of(p).vec, bytes = p.dtype == COMP_KERNELS_FLOAT32 ? 4 : 2;
  const Split found = split({p.num_items, p.num_rows, p.num_cols, p.num_iters, vec, bytes}, device());
  const int64_t cols = (p.num_cols + std::max(found.team, 1) - 1) / std::max(found.team, 1);
  const bool few = 2 * found.team * found.teams < device().multiprocessors && p.num_rows * cols * bytes > kMostBytesOfFewBlocks;
  return few ? Split{} : found;
}

// Takes pieces of a workspace one after the other, 16-byte aligned.
class Pieces {
 public:
  explicit Pieces(void* memory) : begin_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(begin_ + taken_);
    taken_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  char* begin_;
  int64_t taken_ = 0;
};

// The counters stand first, then marginals that were left out: so many bytes must be zero. Enough for a launch per step, where every
// item has a team of its own.
int64_t lay_out(const Params& p, const Split& split, void* workspace, ResidentParams& params, int64_t& zeros) {
  Pieces pieces(workspace);
  const int64_t blocks = p.num_items * split.team;
  params.arrivals = pieces.take<uint32_t>(p.num_items + 1);
  params.rescues = pieces.take<uint32_t>(p.num_items);
  params.stopped = pieces.take<uint32_t>(1);
  if (p.row_marginals == nullptr) params.row_marginals = pieces.take<float>(p.num_rows), params.row_each = 1.f;
  if (p.col_marginals == nullptr) params.col_marginals = pieces.take<float>(p.num_cols), params.col_each = col_share(p);
  zeros = pieces.taken();
  params.u2 = pieces.take<float>(2 * p.num_items * p.num_rows);
  params.v2 = pieces.take<float>(2 * p.num_items * p.num_cols);
  params.partial = pieces.take<float>(2 * blocks * p.num_rows);
  params.pairs = pieces.take<float2>(blocks * p.num_rows);
  params.errors = pieces.take<float2>(2 * blocks);
  return pieces.taken();
}

const char* launch_steps(const Params& p, const Split& split, Kernel kernel, ResidentParams params, void* stream) {
  kernel.shared_bytes = static_cast<int>(split.shared_bytes);
  params.resident_steps = params.more_resident = 0;
  for (int step = 0; step <= kSteps * params.iterations; ++step) {
    params.step = step;
    if (const char* wrong = launch(kernel, p.num_items, split.team, params, stream)) return wrong;
  }
  return nullptr;
}

const char* solve_resident(const Params& p, const Split& split, void* workspace, void* stream) {
  const int vec = kernels_of(p).vec;
  ResidentParams params{};
  params.scores = p.scores;
  params.row_marginals = static_cast<const float*>(p.row_marginals);
  params.col_marginals = static_cast<const float*>(p.col_marginals);
  params.u = static_cast<float*>(p.u), params.v = static_cast<float*>(p.v), params.plan = static_cast<float*>(p.plan);
  params.item_stride = p.item_stride, params.row_stride = static_cast<int>(p.row_stride);
  params.row_marginals_stride = p.row_marginals_stride, params.col_marginals_stride = p.col_marginals_stride;
  params.items = static_cast<int>(p.num_items), params.rows = static_cast<int>(p.num_rows);
  params.cols = static_cast<int>(p.num_cols), params.iterations = static_cast<int>(p.num_iters);
  const int step_rows = kResidentThreads / split.lanes;
  params.team = split.team;
  while (1 << params.lane_bits < split.lanes) ++params.lane_bits;
  params.padded = (params.rows + step_rows - 1) / step_rows * step_rows;
  const int at_once = step_rows * resident_rows_at_once(vec);
  params.batches = (params.padded + at_once - 1) / at_once;
  params.tiles_per_block = split.tiles / split.team, params.larger_blocks = split.tiles % split.team;
  params.resident_steps = split.resident_steps, params.more_resident = split.more_resident, params.merge_all = split.merge_all;
  params.step = kAllSteps;
  params.factor = static_cast<float>(p.factor), params.tol = p.tol < 0 ? -1.f : static_cast<float>(p.tol);
  int64_t zeros = 0;
  lay_out(p, split, workspace, params, zeros);
  if (const char* wrong = clear(params.arrivals, zeros, stream)) return wrong;

  Kernel kernel = resident_kernel(p, vec);
  kernel.shared_bytes = static_cast<int>(split.shared_bytes);
  const bool alone = split.team == 1 && p.tol < 0;  // blocks that wait for no other
  if (alone) return launch(kernel, p.num_items, 1, params, stream);
  // With tol all items stop together, so all must be at work.
  const bool together = device().cooperative && (p.tol < 0 || split.teams == p.num_items);
  bool refused = !together;
  if (together) {
    const char* wrong = launch_cooperative(kernel, split.teams, split.team, &params, sizeof params, stream, &refused);
    if (wrong != nullptr) return wrong;
  }
  return refused ? launch_steps(p, split, kernel, params, stream) : nullptr;
}

const char* solve_by_passes(const Params& p, void* workspace, void* stream) {
  if (p.tol >= 0) return failure("tol needs the resident kernel; passes run a fixed number of iterations");
  const Kernels kernels = kernels_of(p);
  SinkhornParams params = params_of(p, kernels.vec);
  params.partial = static_cast<float2*>(workspace);
  float* potentials = reinterpret_cast<float*>(params.partial + partial_count(p));
  params.v2 = potentials;
  float* u2 = potentials + (p.num_items * p.num_cols + 3) / 4 * 4;
  for (int64_t iteration = 0; iteration < p.num_iters; ++iteration) {
    const bool last = iteration + 1 == p.num_iters;
    params.v = last ? static_cast<float*>(p.v) : nullptr;
    if (const char* wrong = launch_columns(p, kernels, params, stream)) return wrong;
    params.u2 = u2;
    params.u = last ? static_cast<float*>(p.u) : nullptr;
    params.plan = last ? static_cast<float*>(p.plan) : nullptr;
    if (const char* wrong = launch(kernels.rows, p.num_rows, p.num_items, params, stream)) return wrong;
  }
  return nullptr;
}

const char* solve(const Params& p, void* workspace, void* stream) {
  if (const char* wrong = check(p)) return wrong;
  const Split split = split_of(p);
  return split.nanoseconds > 0 ? solve_resident(p, split, workspace, stream) : solve_by_passes(p, workspace, stream);
}

}  // namespace
}  // namespace comp_kernels

// Bytes of device memory that solve and columns need besides their arguments; 16-byte aligned.
COMP_KERNELS_EXPORT int64_t comp_kernels_cuda_sinkhorn_workspace(const comp_kernels_sinkhorn_params* params) {
  const auto& p = *params;
  comp_kernels::ResidentParams unused{};
  int64_t zeros = 0;
  const comp_kernels::Split split = comp_kernels::split_of(p);
  const int64_t resident = split.nanoseconds > 0 ? comp_kernels::lay_out(p, split, nullptr, unused, zeros) : 0;
  return std::max(resident, comp_kernels::partial_count(p) * 8 + (p.num_items * (p.num_cols + p.num_rows) + 4) * 4);
}

// How solve splits the problem over the current device: blocks per item, items at a time, columns of a tile, bytes of shared memory
// per block and of them scores, whether each block merges all rows, and the time by the model of split.h in nanoseconds. All zero
// where passes serve it, which know no tol.
COMP_KERNELS_EXPORT void comp_kernels_cuda_sinkhorn_split(const comp_kernels_sinkhorn_params* params, int64_t numbers[7]) {
  const comp_kernels::Split split = comp_kernels::split_of(*params);
  const bool serves = split.nanoseconds > 0;
  const int64_t found[7] = {split.team,
                            split.teams,
                            split.lanes * comp_kernels::kernels_of(*params).vec,
                            split.shared_bytes,
                            split.score_bytes,
                            split.merge_all,
                            static_cast<int64_t>(split.nanoseconds)};
  for (int i = 0; i < 7; ++i) numbers[i] = serves ? found[i] : 0;
}

// All pointers are device pointers, stream is a cudaStream_t of the current device. Every function returns null, or what is
// wrong (valid until the thread's next call); nothing waits for the device.

// num_iters iterations, fewer once within tol; writes u, v and the plan.
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_sinkhorn_solve(const comp_kernels_sinkhorn_params* params, void* workspace,
                                                                 void* stream) {
  return comp_kernels::solve(*params, workspace, stream);
}

// Per column the largest entry in bits over the rows and the sum of 2^(entry - largest): peaks, sums [items, cols]. Reads u2
// [items, rows].
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_sinkhorn_columns(const comp_kernels_sinkhorn_params* params, float* u2,
                                                                   float* peaks, float* sums, void* workspace, void* stream) {
  if (const char* wrong = comp_kernels::check(*params)) return wrong;
  const comp_kernels::Kernels kernels = comp_kernels::kernels_of(*params);
  comp_kernels::SinkhornParams inputs = comp_kernels::params_of(*params, kernels.vec);
  inputs.u2 = u2, inputs.peaks = peaks, inputs.sums = sums, inputs.partial = static_cast<float2*>(workspace);
  return comp_kernels::launch_columns(*params, kernels, inputs, stream);
}

// log2 of the row sums [items, rows]. Reads v2 [items, cols].
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_sinkhorn_rows(const comp_kernels_sinkhorn_params* params, float* v2,
                                                                float* row_sums, void* stream) {
  if (const char* wrong = comp_kernels::check(*params)) return wrong;
  const comp_kernels::Kernels kernels = comp_kernels::kernels_of(*params);
  comp_kernels::SinkhornParams inputs = comp_kernels::params_of(*params, kernels.vec);
  inputs.v2 = v2, inputs.row_sums = row_sums;
  return comp_kernels::launch(kernels.rows, params->num_rows, params->num_items, inputs, stream);
}

// The plan [items, rows, cols] of params, from u2 and v2.
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_sinkhorn_plan(const comp_kernels_sinkhorn_params* params, float* u2, float* v2,
                                                                void* stream) {
  if (const char* wrong = comp_kernels::check(*params)) return wrong;
  const comp_kernels::Kernels kernels = comp_kernels::kernels_of(*params);
  comp_kernels::SinkhornParams inputs = comp_kernels::params_of(*params, kernels.vec);
  inputs.u2 = u2, inputs.v2 = v2, inputs.plan = static_cast<float*>(params->plan);
  return comp_kernels::launch(kernels.plan, params->num_rows, params->num_items, inputs, stream);
}
