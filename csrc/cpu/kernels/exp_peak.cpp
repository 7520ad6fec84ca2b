// The rate of the kernels' own exponentials with nothing else in the way: a yardstick of the benchmarks.
#include "../exp_peak.h"

#include "../parallel.h"
#include "simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

double exp_peak_exponentials(int64_t rounds) {
  constexpr int64_t kCount = 1024;
  constexpr int kAtOnce = 4;
  const int64_t workers = num_workers();
  parallel_items(workers, workers, [&](int64_t, int64_t) {
    alignas(64) float in[kCount], out[kCount];
    for (int64_t k = 0; k < kCount; ++k) in[k] = -20.0f * static_cast<float>(k) / kCount;
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t k = 0; k < kCount; k += kAtOnce * kLanes<float>) {
        Vec<float> x[kAtOnce];
        for (int j = 0; j < kAtOnce; ++j) x[j] = load(in + k + j * kLanes<float>);
        exp2(x);
        for (int j = 0; j < kAtOnce; ++j) store(out + k + j * kLanes<float>, x[j]);
      }
      asm volatile("" : : "r"(out) : "memory");  // keeps the rounds from being merged
    }
  });
  return static_cast<double>(kCount) * static_cast<double>(rounds) * static_cast<double>(workers);
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
