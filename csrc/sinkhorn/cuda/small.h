// The kernels of sinkhorn over many small matrices, by element type and padded side (4, 8, 16, 32); see small.cu.
#pragma once

#include "common/cuda/kernel.h"

namespace comp_kernels {

struct bf16;
struct fp16;
struct fp32;

template <typename T, int kSide>
Kernel sinkhorn_small_forward_kernel();
template <typename T, int kSide>
Kernel sinkhorn_small_backward_kernel();

}  // namespace comp_kernels
