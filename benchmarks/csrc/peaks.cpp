// What this processor does at best when nothing is in the way: multiply-adds in registers (in the sets that multiply pairs of
// 16 bits, dot products or tiles), the kernels' own exponential in the first level cache. The yardsticks of the benchmarks, per instruction
// set; peaks.py builds and calls them.
#include <chrono>
#include <thread>
#include <vector>

#include "comp_kernels/export.h"
#include "rope_attention/cpu/kernels/matmul.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

// Multiply-adds in registers, `steps` rounds of them; returns the floating-point operations done.
#ifdef COMP_KERNELS_TILES
double multiply_adds(int64_t steps) {
  constexpr int kSums = 4;
  steps /= 4;  // a tile keeps its unit busy for 16 cycles
  const TileRegisters registers;
  for (int64_t step = 0; step < steps; ++step) {
    TILE_PRODUCT(0, 4, 6);
    TILE_PRODUCT(1, 4, 7);
    TILE_PRODUCT(2, 5, 6);
    TILE_PRODUCT(3, 5, 7);
  }
  return 2.0 * kPack * kSums * kTile * kTile * kTile * static_cast<double>(steps);
}
#else
double multiply_adds(int64_t steps) {
  // Enough independent sums to cover the latency of two units: 4 cycles, and 6 of dot products (Zen 5).
  constexpr int kChains = kRegisters == 32 ? 24 : 12;
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
  return 2.0 * kPack * kChains * kLanes<float> * static_cast<double>(steps);
}
#endif

// exp2 of floats that stay in the first level cache, `rounds` times; returns the exponentials taken.
double exponentials(int64_t rounds) {
  constexpr int64_t kCount = 1024;
  constexpr int kAtOnce = 4;
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
  return static_cast<double>(kCount) * static_cast<double>(rounds);
}

// Operations per second of `work(amount)` on all threads together, the best of `rounds`.
double best_rate(double (*work)(int64_t), int64_t amount, int64_t threads, int64_t rounds) {
  double best = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    std::vector<double> done(threads);
    std::vector<std::thread> running;
    const auto start = std::chrono::steady_clock::now();
    for (double& mine : done) running.emplace_back([&mine, work, amount] { mine = work(amount); });
    for (auto& thread : running) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double total = 0;
    for (double mine : done) total += mine;
    if (total / seconds.count() > best) best = total / seconds.count();
  }
  return best;
}

}  // namespace
}  // namespace comp_kernels::COMP_KERNELS_ISA

// Floating-point operations per second; a round takes about 10 ms.
COMP_KERNELS_EXPORT double peak_multiply_add(int64_t threads, int64_t rounds) {
  using namespace comp_kernels::COMP_KERNELS_ISA;
  return best_rate(multiply_adds, 2'500'000, threads, rounds);
}

// Exponentials per second.
COMP_KERNELS_EXPORT double peak_exponentials(int64_t threads, int64_t rounds) {
  using namespace comp_kernels::COMP_KERNELS_ISA;
  return best_rate(exponentials, 40'000, threads, rounds);
}
