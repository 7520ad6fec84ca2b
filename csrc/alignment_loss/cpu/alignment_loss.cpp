// C entry point of alignment_loss: runs the variant for this processor.
#include "alignment_loss.h"

#include "comp_kernels/export.h"

// Returns null, or what went wrong.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_alignment_loss_tile(const comp_kernels_alignment_loss_params* params) {
  return DISPATCH_ISA(alignment_loss_tile, *params);
}
