// C entry point of the peak measurement.
#include "fma_peak.h"

#include "comp_kernels/export.h"

// Runs `steps` rounds of float multiply-adds in registers on every thread; returns the floating-point operations done. The
// caller holds the watch.
COMP_KERNELS_EXPORT double comp_kernels_cpu_fma_operations(int64_t steps) { return DISPATCH_ISA(fma_peak_operations, steps); }
