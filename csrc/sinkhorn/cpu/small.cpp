// C entry points of sinkhorn over many small matrices: run the variant for this processor. Both return null, or what went wrong.
#include "small.h"

#include "marginals.h"

#include "comp_kernels/export.h"

// All iterations, the potentials and the plan.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_sinkhorn_small(const comp_kernels_sinkhorn_small_params* params) {
  return comp_kernels::with_marginals(*params, [](const auto& p) { return DISPATCH_ISA(sinkhorn_small, p); });
}

// The gradient of the scores through all iterations, which are run again.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_sinkhorn_small_backward(const comp_kernels_sinkhorn_small_params* params) {
  return comp_kernels::with_marginals(*params, [](const auto& p) { return DISPATCH_ISA(sinkhorn_small_backward, p); });
}
