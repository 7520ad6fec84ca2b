// C entry point of the peak measurement.
#include "fma_peak.h"

#include <chrono>

#include "comp_kernels/export.h"

// Floating-point operations per second of float multiply-adds in registers, over all threads, best of `rounds` of about 10 ms.
COMP_KERNELS_EXPORT double comp_kernels_cpu_fma_peak(int64_t rounds) {
  double best = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    const double operations = DISPATCH_ISA(fma_peak_operations, 5'000'000);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (operations / seconds.count() > best) best = operations / seconds.count();
  }
  return best;
}
