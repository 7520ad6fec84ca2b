// C entry point of the peak measurement.
#include "fma_peak.h"

#include <algorithm>
#include <chrono>

#include "comp_kernels/export.h"

namespace {

template <typename Run>
double best_rate(int64_t rounds, Run run) {
  double best = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    const double operations = run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, operations / seconds.count());
  }
  return best;
}

constexpr int64_t kSteps = 2'500'000;

}  // namespace

// Floating-point operations per second of float multiply-adds in registers, over all threads, best of `rounds` of about 10 ms.
COMP_KERNELS_EXPORT double comp_kernels_cpu_fma_peak(int64_t rounds) {
  return best_rate(rounds, [] { return DISPATCH_ISA(fma_peak_operations, kSteps); });
}

// The same of what rope_attention multiplies bfloat16 with: dot products of pairs, or the multiply-adds above.
COMP_KERNELS_EXPORT double comp_kernels_cpu_bfloat16_peak(int64_t rounds) {
  return best_rate(rounds, [] { return DISPATCH_BFLOAT16(fma_peak_operations, kSteps); });
}
