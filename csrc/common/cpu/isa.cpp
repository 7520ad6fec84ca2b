// Finds the processor's instruction sets.
#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "comp_kernels/export.h"

#if defined(COMP_KERNELS_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace comp_kernels {
namespace {

constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

const char* name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

#ifdef COMP_KERNELS_HAS_BFLOAT16
// Tiles of bfloat16, and the system's leave to use them: it saves their registers only for processes that asked.
bool has_amx() {
#ifdef __linux__
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;
  if ((edx & kBfloat16) == 0 || (edx & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool has(Isa isa) {
#ifdef COMP_KERNELS_X86
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef COMP_KERNELS_HAS_BFLOAT16
    case Isa::avx512_bf16: return has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx: return has(Isa::avx512_bf16) && has_amx();
#endif
    default: return false;
  }
#else
  return isa == Isa::baseline;
#endif
}

// Intel multiplies pairs of bfloat16 in vectors at half the rate of float: a set to skip there unless asked for.
bool worth_taking(Isa isa) {
#ifdef COMP_KERNELS_X86
  return isa != Isa::avx512_bf16 || !__builtin_cpu_is("intel");
#else
  return isa == Isa::baseline;
#endif
}

Isa choose_isa() {
  const char* wanted = std::getenv("COMP_KERNELS_CPU_ISA");
  Isa best = Isa::baseline;
  for (Isa isa : kIsas) {
    const bool named = wanted != nullptr && std::strcmp(wanted, name(isa)) == 0;
    if (has(isa) && (named || worth_taking(isa))) best = isa;
    if (named) break;
  }
  return best;
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
