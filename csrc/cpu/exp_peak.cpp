// C entry point of the measurement of exponentials.
#include "exp_peak.h"

#include <chrono>

#include "comp_kernels/export.h"

// Exponentials per second of floats in the first level cache, over all threads, best of `rounds` of about 10 ms.
COMP_KERNELS_EXPORT double comp_kernels_cpu_exp_peak(int64_t rounds) {
  double best = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    const double exponentials = DISPATCH_ISA(exp_peak_exponentials, 40'000);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (exponentials / seconds.count() > best) best = exponentials / seconds.count();
  }
  return best;
}
