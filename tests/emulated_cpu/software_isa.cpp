// Takes the place of csrc/common/cpu/isa.cpp in a library that has the sets that multiply pairs alone, in software: the environment
// variable COMP_KERNELS_CPU_ISA names the one in use, anew for every call.
#include "common/cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "comp_kernels/export.h"
#include "rope_attention/cpu/rope_attention.h"

namespace comp_kernels {

Isa active_isa() {
  const char* wanted = std::getenv("COMP_KERNELS_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "amx_fp16") == 0) return Isa::amx_fp16;
  if (wanted != nullptr && std::strcmp(wanted, "amx_bf16x3") == 0) return Isa::amx_bf16x3;
  if (wanted != nullptr && std::strcmp(wanted, "amx") == 0) return Isa::amx;
  if (wanted != nullptr && std::strcmp(wanted, "avx512_bf16") == 0) return Isa::avx512_bf16;
  return Isa::baseline;
}

Isa products_isa() { return active_isa(); }

bool splits_short_sequences() { return active_isa() == Isa::amx_bf16x3; }

const bool tiles_wait_for_prefetches = false;

// What the other sets would have.
#define REFUSE(isa, function)                                            \
  const char* isa::function(const comp_kernels_rope_attention_params&) { \
    return "this library has nothing but the sets that multiply pairs";  \
  }
#define REFUSE_BOTH(isa) REFUSE(isa, rope_attention_forward) REFUSE(isa, rope_attention_backward)
REFUSE_BOTH(baseline)
REFUSE_BOTH(avx2)
REFUSE_BOTH(avx512)

}  // namespace comp_kernels

COMP_KERNELS_EXPORT const char* comp_kernels_cpu_isa(void) {
  switch (comp_kernels::active_isa()) {
    case comp_kernels::Isa::amx_fp16: return "amx_fp16 (in software)";
    case comp_kernels::Isa::amx_bf16x3: return "amx_bf16x3 (in software)";
    case comp_kernels::Isa::amx: return "amx (in software)";
    case comp_kernels::Isa::avx512_bf16: return "avx512_bf16 (in software)";
    default: return "none";
  }
}
