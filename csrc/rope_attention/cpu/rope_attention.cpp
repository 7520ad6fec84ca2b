// C entry points of rope_attention: check what the caller cannot, then run the variant for this processor.
#include "rope_attention.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>

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
  if ((p.cos != nullptr || p.cos_k != nullptr) && p.table_width != p.rotary_dim && 2 * p.table_width != p.rotary_dim) {
    std::snprintf(message, sizeof message, "table_width must be rotary_dim = %lld or half of it, got %lld",
                  static_cast<long long>(p.rotary_dim), static_cast<long long>(p.table_width));
    return message;
  }
  if (const char* wrong = check_cu_seqlens("cu_seqlens", p.cu_seqlens, p.num_sequences, p.num_tokens)) return wrong;
  return check_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p.num_sequences, p.num_tokens_k);
}

int64_t element_size(int64_t dtype) { return dtype == COMP_KERNELS_FLOAT64 ? 8 : dtype == COMP_KERNELS_FLOAT32 ? 4 : 2; }

int64_t compute_size(int64_t dtype) { return dtype == COMP_KERNELS_FLOAT64 ? 8 : 4; }

// Zeros rows begin .. end of a contiguous tensor with `row_bytes` per row; null is passed over.
void zero_rows(void* x, int64_t begin, int64_t end, int64_t row_bytes) {
  if (x != nullptr) std::memset(static_cast<char*>(x) + begin * row_bytes, 0, (end - begin) * row_bytes);
}

// Rows beyond the last sequence belong to no item of work.
void fill_slack_forward(const comp_kernels_rope_attention_params& p) {
  const int64_t used = p.cu_seqlens[p.num_sequences];
  zero_rows(p.out, used, p.num_tokens, p.num_heads * p.head_dim * element_size(p.dtype));
  for (int64_t head = 0; head < p.num_heads; ++head) {
    double* row = static_cast<double*>(p.lse) + head * p.num_tokens;
    std::fill(row + used, row + p.num_tokens, -std::numeric_limits<double>::infinity());
  }
}

void fill_slack_backward(const comp_kernels_rope_attention_params& p) {
  const int64_t used = p.cu_seqlens[p.num_sequences], used_k = p.cu_seqlens_k[p.num_sequences];
  const int64_t row = p.head_dim * element_size(p.dtype), table_row = p.table_width * compute_size(p.dtype);
  zero_rows(p.dq, used, p.num_tokens, p.num_heads * row);
  for (void* x : {p.dk, p.dv}) zero_rows(x, used_k, p.num_tokens_k, p.num_heads_k * row);
  for (void* x : {p.dcos, p.dsin}) zero_rows(x, used, p.num_tokens, p.num_heads * table_row);
  for (void* x : {p.dcos_k, p.dsin_k}) zero_rows(x, used_k, p.num_tokens_k, p.num_heads_k * table_row);
}

// Whether numbers are multiplied as three bfloat16 (kernels/terms.h): where there are AMX tiles but none for the dtype, and enough
// keys for the queries, on average, to make up for splitting the rows. Both passes must find the same, for the backward pass
// recomputes the scores of the forward pass.
constexpr double kKeysWorthSplitting = 160;
bool are_split(const comp_kernels_rope_attention_params& p) {
  using comp_kernels::Isa;
  const Isa isa = comp_kernels::active_isa();
  const bool may_be = p.dtype == COMP_KERNELS_FLOAT32 || (p.dtype == COMP_KERNELS_FLOAT16 && isa < Isa::amx_fp16);
  if (isa < Isa::amx_bf16x3 || !may_be) return false;
  double scores = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    scores += static_cast<double>(p.cu_seqlens[b + 1] - p.cu_seqlens[b]) * (p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
  }
  return scores >= kKeysWorthSplitting * p.cu_seqlens[p.num_sequences] || comp_kernels::splits_short_sequences();
}

// The variant of a kernel for what `params` holds.
#define DISPATCH_DTYPE(function, params)                                           \
  (are_split(params)                         ? DISPATCH_SPLIT(function, params)    \
   : (params).dtype == COMP_KERNELS_BFLOAT16 ? DISPATCH_BFLOAT16(function, params) \
   : (params).dtype == COMP_KERNELS_FLOAT16  ? DISPATCH_FLOAT16(function, params)  \
                                             : DISPATCH_PRODUCTS(function, params))

// run(), which returns null or a message. No exception may cross the C ABI: the process would end.
template <typename Run>
const char* within_memory(Run&& run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}

}  // namespace

// Both return null, or what is wrong (valid until the thread's next call).
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_rope_attention_forward(const comp_kernels_rope_attention_params* params) {
  if (const char* wrong = check(*params)) return wrong;
  fill_slack_forward(*params);
  return within_memory([&] { return DISPATCH_DTYPE(rope_attention_forward, *params); });
}

COMP_KERNELS_EXPORT const char* comp_kernels_cpu_rope_attention_backward(const comp_kernels_rope_attention_params* params) {
  if (const char* wrong = check(*params)) return wrong;
  fill_slack_backward(*params);
  return within_memory([&] { return DISPATCH_DTYPE(rope_attention_backward, *params); });
}
