// C entry points of sinkhorn over many small matrices on CUDA: check, choose the kernel, fill its params, launch. No device code.
#include "comp_kernels/sinkhorn_small.h"

#include <algorithm>
#include <cstdint>

#include "comp_kernels/export.h"
#include "small.cuh"

namespace comp_kernels {
namespace {

using Params = comp_kernels_sinkhorn_small_params;

constexpr int64_t kSharedHistoryBytes = 48 * 1024;  // what every device grants; four blocks of it still fit a multiprocessor

template <int kSide>
Kernel kernel_of(int64_t dtype, bool backward) {
  if (dtype == COMP_KERNELS_FLOAT32) {
    return backward ? sinkhorn_small_backward_kernel<fp32, kSide>() : sinkhorn_small_forward_kernel<fp32, kSide>();
  }
  if (dtype == COMP_KERNELS_BFLOAT16) {
    return backward ? sinkhorn_small_backward_kernel<bf16, kSide>() : sinkhorn_small_forward_kernel<bf16, kSide>();
  }
  return backward ? sinkhorn_small_backward_kernel<fp16, kSide>() : sinkhorn_small_forward_kernel<fp16, kSide>();
}

Kernel kernel_of(const Params& p, bool backward) {
  const int64_t side = std::max(p.num_rows, p.num_cols);
  if (side <= 4) return kernel_of<4>(p.dtype, backward);
  if (side <= 8) return kernel_of<8>(p.dtype, backward);
  return side <= 16 ? kernel_of<16>(p.dtype, backward) : kernel_of<32>(p.dtype, backward);
}

int64_t blocks_of(const Params& p) {
  const int64_t per_block = kernel_of(p, false).rows;
  return (p.num_items + per_block - 1) / per_block;
}

// Scalings of every iteration, two numbers per thread of a block.
int64_t history_bytes(const Params& p) { return 2 * (p.num_iters + 1) * kSmallThreads * 4; }

const char* check(const Params& p) {
  if (p.dtype == COMP_KERNELS_FLOAT64) return failure("dtype must be float32, bfloat16 or float16, got float64");
  if (std::min(p.num_rows, p.num_cols) < 1 || std::max(p.num_rows, p.num_cols) > COMP_KERNELS_SMALL_SIDE) {
    return failure("sides must be 1 to %d", COMP_KERNELS_SMALL_SIDE);
  }
  if (p.num_iters > INT32_MAX / 2) return failure("at most %d iterations", INT32_MAX / 2);
  return nullptr;
}

SinkhornSmallParams params_of(const Params& p) {
  SinkhornSmallParams params{};
  const bool rows_first = p.rows_first != 0;
  params.scores = p.scores;
  params.plan = static_cast<float*>(p.plan);
  params.grad_plan = static_cast<const float*>(p.grad_plan);
  params.grad_scores = p.grad_scores;
  const auto *row_marginals = static_cast<const float*>(p.row_marginals),
             *col_marginals = static_cast<const float*>(p.col_marginals);
  const auto *grad_u = static_cast<const float*>(p.grad_u), *grad_v = static_cast<const float*>(p.grad_v);
  auto *u = static_cast<float*>(p.u), *v = static_cast<float*>(p.v);
  params.a = rows_first ? col_marginals : row_marginals, params.b = rows_first ? row_marginals : col_marginals;
  const float share = static_cast<float>(static_cast<double>(p.num_rows) / static_cast<double>(p.num_cols));
  params.a_each = rows_first ? share : 1.f, params.b_each = rows_first ? 1.f : share;
  params.u = rows_first ? v : u, params.v = rows_first ? u : v;
  params.grad_u = rows_first ? grad_v : grad_u, params.grad_v = rows_first ? grad_u : grad_v;
  params.a_stride = rows_first ? p.col_marginals_stride : p.row_marginals_stride;
  params.b_stride = rows_first ? p.row_marginals_stride : p.col_marginals_stride;
  const int rows = static_cast<int>(p.num_rows), cols = static_cast<int>(p.num_cols);
  params.second = rows_first ? cols : rows, params.first = rows_first ? rows : cols;
  params.second_stride = rows_first ? 1 : cols, params.first_stride = rows_first ? cols : 1;
  params.items = p.num_items, params.item_stride = p.item_stride;
  params.iterations = static_cast<int>(p.num_iters);
  params.factor = static_cast<float>(p.factor), params.eps = static_cast<float>(p.eps);
  params.scale = static_cast<float>(p.factor * 0.693147180559945309417);
  return params;
}

}  // namespace
}  // namespace comp_kernels

// Bytes of device memory that the backward pass needs besides its arguments; 0 where shared memory holds what it keeps.
COMP_KERNELS_EXPORT int64_t comp_kernels_cuda_sinkhorn_small_workspace(const comp_kernels_sinkhorn_small_params* params) {
  const int64_t bytes = comp_kernels::history_bytes(*params);
  return bytes <= comp_kernels::kSharedHistoryBytes ? 0 : bytes * comp_kernels::blocks_of(*params);
}

// All pointers are device pointers, stream is a cudaStream_t of the current device. Both functions return null, or what is wrong
// (valid until the thread's next call); nothing waits for the device.

// All iterations: writes plan, u and v.
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_sinkhorn_small(const comp_kernels_sinkhorn_small_params* params, void* stream) {
  if (const char* wrong = comp_kernels::check(*params)) return wrong;
  return comp_kernels::launch(comp_kernels::kernel_of(*params, false), comp_kernels::blocks_of(*params), 1,
                              comp_kernels::params_of(*params), stream);
}

// The gradient of the scores through all iterations, which are run again. workspace: as many bytes as said above, or null.
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_sinkhorn_small_backward(const comp_kernels_sinkhorn_small_params* params,
                                                                          void* workspace, void* stream) {
  if (const char* wrong = comp_kernels::check(*params)) return wrong;
  comp_kernels::Kernel kernel = comp_kernels::kernel_of(*params, true);
  comp_kernels::SinkhornSmallParams inputs = comp_kernels::params_of(*params);
  inputs.history = static_cast<float*>(workspace);
  if (workspace == nullptr) kernel.shared_bytes = static_cast<int>(comp_kernels::history_bytes(*params));
  return comp_kernels::launch(kernel, comp_kernels::blocks_of(*params), 1, inputs, stream);
}
