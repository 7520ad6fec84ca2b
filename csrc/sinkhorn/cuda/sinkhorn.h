// The kernels of sinkhorn by element type and elements per access (kVec: 16 bytes' worth, or 1); see passes.cu.
#pragma once

#include "common/cuda/kernel.h"

namespace comp_kernels {

struct bf16;
struct fp16;
struct fp32;

template <typename T, int kVec>
Kernel sinkhorn_columns_kernel();
template <typename T, int kVec>
Kernel sinkhorn_rows_kernel();
template <typename T, int kVec>
Kernel sinkhorn_plan_kernel();
Kernel sinkhorn_merge_kernel();

}  // namespace comp_kernels
