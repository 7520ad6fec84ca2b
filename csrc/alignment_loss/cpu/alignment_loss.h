// The kernel behind alignment_loss's C entry point, one variant per instruction set.
#pragma once

#include "comp_kernels/alignment_loss.h"
#include "common/cpu/isa.h"

// Returns null, or a message when something is wrong.
DECLARE_PER_ISA(const char* alignment_loss_tile(const comp_kernels_alignment_loss_params& params))
