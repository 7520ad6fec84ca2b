// The kernels of passes.cuh, by element type and elements per access.
#include "passes.cuh"

INSTANTIATE_SINKHORN(fp32, 4)
INSTANTIATE_SINKHORN(bf16, 8)
INSTANTIATE_SINKHORN(fp16, 8)
INSTANTIATE_SINKHORN(fp32, 1)
INSTANTIATE_SINKHORN(bf16, 1)
INSTANTIATE_SINKHORN(fp16, 1)

extern "C" __global__ void __launch_bounds__(comp_kernels::kSinkhornThreads)
    sinkhorn_merge(const __grid_constant__ comp_kernels::SinkhornParams params) {
  comp_kernels::sinkhorn_merge(params);
}
comp_kernels::Kernel comp_kernels::sinkhorn_merge_kernel() {
  return {"sinkhorn_merge", reinterpret_cast<const void*>(::sinkhorn_merge), kSinkhornThreads, 0, 1};
}
