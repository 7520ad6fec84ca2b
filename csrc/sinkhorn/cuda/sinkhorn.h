// The kernels of sinkhorn by element type and elements per access (kVec: 16 bytes' worth, or 1); see passes.cu.
#pragma once

#include "common/cuda/kernel.h"

namespace comp_kernels {

template <typename T, int kVec>
Kernel sinkhorn_columns_kernel();
template <typename T, int kVec>
Kernel sinkhorn_rows_kernel();
template <typename T, int kVec>
Kernel sinkhorn_plan_kernel();
Kernel sinkhorn_merge_kernel();

// Those over many small matrices, by element type and padded side (4, 8, 16, 32); see small.cu.
template <typename T, int kSide>
Kernel sinkhorn_small_forward_kernel();
template <typename T, int kSide>
Kernel sinkhorn_small_backward_kernel();

}  // namespace comp_kernels
