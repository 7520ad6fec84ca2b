// The kernels behind sinkhorn's C entry points, one variant per instruction set.
#pragma once

#include "comp_kernels/sinkhorn.h"
#include "common/cpu/isa.h"

// Return null, or a message when something is wrong. What each computes is said in sinkhorn.cpp, beside its entry point.
DECLARE_PER_ISA(const char* sinkhorn_solve(const comp_kernels_sinkhorn_params& params))
DECLARE_PER_ISA(const char* sinkhorn_iterate(const comp_kernels_sinkhorn_step_params& params))
DECLARE_PER_ISA(const char* sinkhorn_column_statistics(const comp_kernels_sinkhorn_step_params& params))
DECLARE_PER_ISA(const char* sinkhorn_row_statistics(const comp_kernels_sinkhorn_step_params& params))
DECLARE_PER_ISA(const char* sinkhorn_plan(const comp_kernels_sinkhorn_step_params& params))
