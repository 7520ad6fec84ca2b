// Finds the processor's instruction sets.
#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "comp_kernels/export.h"

namespace comp_kernels {
namespace {

Isa best_isa() {
#ifdef COMP_KERNELS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("COMP_KERNELS_CPU_ISA");
  if (wanted == nullptr) return best;
  Isa limit = best;
  if (std::strcmp(wanted, "baseline") == 0) limit = Isa::baseline;
  if (std::strcmp(wanted, "avx2") == 0) limit = Isa::avx2;
  return limit < best ? limit : best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace comp_kernels

// Name of the instruction set in use.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_isa(void) {
  switch (comp_kernels::active_isa()) {
    case comp_kernels::Isa::avx512: return "avx512";
    case comp_kernels::Isa::avx2: return "avx2";
    default: break;
  }
#if defined(__aarch64__)
  return "baseline (NEON)";
#elif defined(COMP_KERNELS_X86)
  return "baseline (SSE2)";
#else
  return "baseline";
#endif
}
