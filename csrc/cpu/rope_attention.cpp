// C entry points of rope_attention: check what the caller cannot, then run the variant for this processor.
#include "rope_attention.h"

#include <cstdio>

#include "comp_kernels/export.h"

namespace {

thread_local char message[256];

// cu_seqlens decides which memory is touched, so it is checked here too: a compiled graph skips the checks in Python.
const char* check_cu_seqlens(const char* name, const int32_t* bounds, int64_t sequences, int64_t tokens) {
  bool good = bounds[0] == 0 && bounds[sequences] <= tokens;
  for (int64_t b = 0; b < sequences; ++b) good = good && bounds[b] <= bounds[b + 1];
  if (good) return nullptr;
  std::snprintf(message, sizeof message, "%s must start at 0, never decrease and end at or below the %lld tokens", name,
                static_cast<long long>(tokens));
  return message;
}

const char* check(const comp_kernels_rope_attention_params& p) {
  if (p.head_dim <= 0 || p.head_dim % 2 != 0 || p.head_dim > comp_kernels::kMaxHeadDim) {
    std::snprintf(message, sizeof message, "head_dim must be even and at most %d, got %lld", comp_kernels::kMaxHeadDim,
                  static_cast<long long>(p.head_dim));
    return message;
  }
  if (const char* wrong = check_cu_seqlens("cu_seqlens", p.cu_seqlens, p.num_sequences, p.num_tokens)) return wrong;
  return check_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p.num_sequences, p.num_tokens_k);
}

}  // namespace

// Both return null, or what is wrong with the arguments (valid until the thread's next call).
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_rope_attention_forward(const comp_kernels_rope_attention_params* params) {
  if (const char* wrong = check(*params)) return wrong;
  return DISPATCH_ISA(rope_attention_forward, *params);
}

COMP_KERNELS_EXPORT const char* comp_kernels_cpu_rope_attention_backward(const comp_kernels_rope_attention_params* params) {
  if (const char* wrong = check(*params)) return wrong;
  return DISPATCH_ISA(rope_attention_backward, *params);
}
