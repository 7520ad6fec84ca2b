// The kernels behind the C entry points of sinkhorn over many small matrices, one variant per instruction set.
#pragma once

#include "comp_kernels/sinkhorn_small.h"
#include "common/cpu/isa.h"

// Return null, or a message when something is wrong. What each computes is said in small.cpp, beside its entry point.
DECLARE_PER_ISA(const char* sinkhorn_small(const comp_kernels_sinkhorn_small_params& params))
DECLARE_PER_ISA(const char* sinkhorn_small_backward(const comp_kernels_sinkhorn_small_params& params))
