// Finds the processor's instruction sets.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "comp_kernels/export.h"

namespace comp_kernels {
namespace {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

Isa best_isa() {
#ifdef COMP_KERNELS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef COMP_KERNELS_HAS_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
#endif
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
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wanted, name(isa)) == 0) limit = isa;
  }
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
  const comp_kernels::Isa isa = comp_kernels::active_isa();
  if (isa != comp_kernels::Isa::baseline) return comp_kernels::name(isa);
#if defined(__aarch64__)
  return "baseline (NEON)";
#elif defined(COMP_KERNELS_X86)
  return "baseline (SSE2)";
#else
  return "baseline";
#endif
}
