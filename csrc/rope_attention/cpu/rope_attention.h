// The kernels behind rope_attention's C entry points, one variant per instruction set.
#pragma once

#include "comp_kernels/rope_attention.h"
#include "common/cpu/isa.h"

namespace comp_kernels {
constexpr int kMaxHeadDim = 256;
}

// Return null, or a message when memory ran out.
DECLARE_PER_ISA(const char* rope_attention_forward(const comp_kernels_rope_attention_params& params))
DECLARE_PER_ISA(const char* rope_attention_backward(const comp_kernels_rope_attention_params& params))

// The same for the dtypes alone that a set multiplies in pairs of 16 bits (isa.h).
DECLARE_PAIRS(const char* rope_attention_forward(const comp_kernels_rope_attention_params& params))
DECLARE_PAIRS(const char* rope_attention_backward(const comp_kernels_rope_attention_params& params))
