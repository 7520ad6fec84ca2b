// The rate of multiply-adds this machine reaches when nothing else is in the way: the yardstick of the benchmarks. In the set that
// multiplies bfloat16, of its dot products.
#include "../fma_peak.h"

#include "../parallel.h"
#include "matmul.h"

namespace comp_kernels::COMP_KERNELS_ISA {

double fma_peak_operations(int64_t steps) {
  // Enough independent sums to cover the latency of two units: 4 cycles, and 6 of dot products (Zen 5).
  constexpr int kChains = kRegisters == 32 ? 24 : 12;
  const int64_t workers = num_workers();
  parallel_items(workers, workers, [&](int64_t, int64_t) {
    Vec<float> sums[kChains];
    for (auto& sum : sums) sum = broadcast(1.0f);
    Vec<float> factor = broadcast(0.999f), term = broadcast(0.001f);
    for (int64_t step = 0; step < steps; ++step) {
#if defined(__x86_64__)
      asm volatile("" : "+x"(factor), "+x"(term));  // keeps the loop from being computed in advance
#else
      asm volatile("" : "+w"(factor), "+w"(term));
#endif
#pragma GCC unroll 24
      for (auto& sum : sums) sum = multiply_add(factor, term, sum);
    }
    volatile float sink = 0;
    for (auto& sum : sums) sink = sink + sum[0];
  });
  return 2.0 * kPack * kChains * kLanes<float> * static_cast<double>(steps) * static_cast<double>(workers);
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
