// C entry points of sinkhorn on CUDA: check, lay out the workspace, fill the kernels' params, launch. No device code.
#include "comp_kernels/sinkhorn.h"

#include <algorithm>
#include <cstdint>

#include "comp_kernels/export.h"
#include "passes.cuh"

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
  const bool aligned = reinterpret_cast<uintptr_t>(p.scores) % 16 == 0 && p.row_stride % kVec == 0 &&
                       p.item_stride % kVec == 0 && p.num_cols % kVec == 0;
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

const char* check(const Params& p) {
  if (p.dtype == COMP_KERNELS_FLOAT64) return failure("dtype must be float32, bfloat16 or float16, got float64");
  if (std::max(p.num_rows, p.num_cols) > INT32_MAX / 2) return failure("at most %d rows or columns", INT32_MAX / 2);
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
  params.factor = static_cast<float>(p.factor);
  return params;
}

const char* launch_columns(const Params& p, const Kernels& kernels, const SinkhornParams& params, void* stream) {
  const char* wrong =
      launch(kernels.columns, column_blocks(p, kernels.vec), p.num_items * params.chunks, params, stream);
  if (wrong != nullptr) return wrong;
  return launch(sinkhorn_merge_kernel(), (p.num_cols + kSinkhornThreads - 1) / kSinkhornThreads, p.num_items, params, stream);
}

int64_t partial_count(const Params& p) { return p.num_items * chunks_of(p, kernels_of(p).vec) * p.num_cols; }

const char* solve(const Params& p, void* workspace, void* stream) {
  if (const char* wrong = check(p)) return wrong;
  if (p.tol >= 0) return failure("tol needs the columns and rows passes; solve runs a fixed number of iterations");
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

}  // namespace
}  // namespace comp_kernels

// Bytes of device memory that solve and columns need besides their arguments; 16-byte aligned.
COMP_KERNELS_EXPORT int64_t comp_kernels_cuda_sinkhorn_workspace(const comp_kernels_sinkhorn_params* params) {
  const auto& p = *params;
  return comp_kernels::partial_count(p) * 8 + (p.num_items * (p.num_cols + p.num_rows) + 4) * 4;
}

// All pointers are device pointers, stream is a cudaStream_t of the current device. Every function returns null, or what is
// wrong (valid until the thread's next call); nothing waits for the device.

// num_iters iterations; writes u, v and, unless null, the plan. tol is not looked at on a device and must be negative.
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
