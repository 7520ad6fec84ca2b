// Finds the processor's instruction sets.
#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "comp_kernels/export.h"

#ifdef COMP_KERNELS_X86
#include <cpuid.h>
#endif
#if defined(COMP_KERNELS_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace comp_kernels {
namespace {

constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx, Isa::amx_bf16x3, Isa::amx_fp16};

const char* name(Isa isa) {
  switch (isa) {
    case Isa::amx_fp16: return "amx_fp16";
    case Isa::amx_bf16x3: return "amx_bf16x3";
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

#ifdef COMP_KERNELS_HAS_PAIRS
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

// Tiles of float16 too.
bool has_amx_fp16() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kFloat16 = 1u << 21;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kFloat16) != 0;
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
#ifdef COMP_KERNELS_HAS_PAIRS
    case Isa::avx512_bf16: return has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
    case Isa::amx_bf16x3: return has(Isa::avx512_bf16) && has_amx();
    case Isa::amx_fp16: return has(Isa::amx) && has_amx_fp16();
#endif
    default: return false;
  }
#else
  return isa == Isa::baseline;
#endif
}

bool is_intel() {
#ifdef COMP_KERNELS_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// A set to skip unless asked for: Intel multiplies pairs of bfloat16 in vectors at half the rate of float.
bool worth_taking(Isa isa) {
#ifdef COMP_KERNELS_X86
  return isa != Isa::avx512_bf16 || !is_intel();
#else
  return isa == Isa::baseline;
#endif
}

// AMD's family 25 with AVX-512 is Zen 4: 64 bytes take two passes through units of 32. Multiply-adds are then as fast in AVX2, and
// all else (rows and tiles that 16 numbers do not divide, transpositions) is faster.
bool executes_avx512_in_halves() {
#ifdef COMP_KERNELS_X86
  unsigned eax, ebx, ecx, edx;
  if (!has(Isa::avx512) || !__builtin_cpu_is("amd") || __get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return false;
  const unsigned base = eax >> 8 & 0xf, extended = eax >> 20 & 0xff;
  return base + extended == 25;
#else
  return false;
#endif
}

bool is_named(Isa isa) {
  const char* wanted = std::getenv("COMP_KERNELS_CPU_ISA");
  return wanted != nullptr && std::strcmp(wanted, name(isa)) == 0;
}

Isa choose_isa() {
  Isa best = Isa::baseline;
  for (Isa isa : kIsas) {
    if (has(isa) && (is_named(isa) || worth_taking(isa))) best = isa;
    if (is_named(isa)) break;
  }
  return best;
}

Isa choose_products_isa() {
  const Isa best = active_isa();
  return best >= Isa::avx512 && !is_named(best) && executes_avx512_in_halves() ? Isa::avx2 : best;
}

}  // namespace

const bool tiles_wait_for_prefetches = is_intel();

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

Isa products_isa() {
  static const Isa isa = choose_products_isa();
  return isa;
}

bool splits_short_sequences() {
  static const bool named = is_named(Isa::amx_bf16x3);
  return named;
}

}  // namespace comp_kernels

// Name of the instruction set in use, and in brackets what differs.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_isa(void) {
  const comp_kernels::Isa isa = comp_kernels::active_isa();
  if (comp_kernels::products_isa() != isa) {
    return isa == comp_kernels::Isa::avx512 ? "avx512 (attention: avx2)" : "avx512_bf16 (attention but in bfloat16: avx2)";
  }
  if (isa != comp_kernels::Isa::baseline) return comp_kernels::name(isa);
#if defined(__aarch64__)
  return "baseline (NEON)";
#elif defined(COMP_KERNELS_X86)
  return "baseline (SSE2)";
#else
  return "baseline";
#endif
}
