// Instruction sets: every file of csrc/*/cpu/kernels is compiled once per set, in a namespace of its own; the choice between
// them is made at run time. The sets that multiply 16-bit numbers in pairs hold the attention kernels alone, for bfloat16
// (avx512_bf16, amx), float32 and float16 as three bfloat16 (amx_bf16x3) or float16 (amx_fp16); all else takes avx512.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define COMP_KERNELS_X86 1
#endif

namespace comp_kernels {

// Ordered: each set contains those before it. Baseline is what the architecture guarantees (SSE2, or NEON on aarch64).
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4, amx_bf16x3 = 5, amx_fp16 = 6 };

// The set in use: the best this processor has, or a lower one by the environment variable COMP_KERNELS_CPU_ISA.
Isa active_isa();

// The set whose float products attention takes: the same, but AVX2 on processors that execute AVX-512 in halves (Zen 4), where it
// is the faster one, unless COMP_KERNELS_CPU_ISA names the other.
Isa products_isa();

// Whether COMP_KERNELS_CPU_ISA names amx_bf16x3, which then serves sequences however short they are.
bool splits_short_sequences();

// Whether multiply-adds wait for a line that was asked for among them, as on Intel processors with AVX-512: rows_ahead.h.
extern const bool tiles_wait_for_prefetches;

}  // namespace comp_kernels

// Declares a function that csrc/*/cpu/kernels defines once per instruction set.
#ifdef COMP_KERNELS_X86
#define DECLARE_PER_ISA(declaration) \
  namespace comp_kernels {           \
  namespace baseline {               \
  declaration;                       \
  }                                  \
  namespace avx2 {                   \
  declaration;                       \
  }                                  \
  namespace avx512 {                 \
  declaration;                       \
  }                                  \
  }
#define DISPATCH_TO(isa, function, ...)                                                 \
  ((isa) >= ::comp_kernels::Isa::avx512 ? ::comp_kernels::avx512::function(__VA_ARGS__) \
   : (isa) == ::comp_kernels::Isa::avx2 ? ::comp_kernels::avx2::function(__VA_ARGS__)   \
                                        : ::comp_kernels::baseline::function(__VA_ARGS__))
#else
#define DECLARE_PER_ISA(declaration) \
  namespace comp_kernels {           \
  namespace baseline {               \
  declaration;                       \
  }                                  \
  }
#define DISPATCH_TO(isa, function, ...) ::comp_kernels::baseline::function(__VA_ARGS__)
#endif

// Calls the variant in use, DISPATCH_ISA(sinkhorn_plan, params); DISPATCH_PRODUCTS that of products_isa.
#define DISPATCH_ISA(function, ...) DISPATCH_TO(::comp_kernels::active_isa(), function, __VA_ARGS__)
#define DISPATCH_PRODUCTS(function, ...) DISPATCH_TO(::comp_kernels::products_isa(), function, __VA_ARGS__)

// Where the compiler knows the sets that multiply pairs, declares a function that they have; DISPATCH_BFLOAT16 and DISPATCH_FLOAT16
// call it where a set for that dtype is in use, and the variant of DISPATCH_PRODUCTS elsewhere. DISPATCH_SPLIT calls that of three
// bfloat16, for callers that know it to be in use.
#ifdef COMP_KERNELS_HAS_PAIRS
#define DECLARE_PAIRS(declaration) \
  namespace comp_kernels {         \
  namespace avx512_bf16 {          \
  declaration;                     \
  }                                \
  namespace amx {                  \
  declaration;                     \
  }                                \
  namespace amx_bf16x3 {           \
  declaration;                     \
  }                                \
  namespace amx_fp16 {             \
  declaration;                     \
  }                                \
  }
#define DISPATCH_BFLOAT16(function, ...)                                                                                   \
  (::comp_kernels::active_isa() >= ::comp_kernels::Isa::amx           ? ::comp_kernels::amx::function(__VA_ARGS__)         \
   : ::comp_kernels::active_isa() == ::comp_kernels::Isa::avx512_bf16 ? ::comp_kernels::avx512_bf16::function(__VA_ARGS__) \
                                                                      : DISPATCH_PRODUCTS(function, __VA_ARGS__))
#define DISPATCH_FLOAT16(function, ...)                                                                            \
  (::comp_kernels::active_isa() == ::comp_kernels::Isa::amx_fp16 ? ::comp_kernels::amx_fp16::function(__VA_ARGS__) \
                                                                 : DISPATCH_PRODUCTS(function, __VA_ARGS__))
#define DISPATCH_SPLIT(function, ...) ::comp_kernels::amx_bf16x3::function(__VA_ARGS__)
#else
#define DECLARE_PAIRS(declaration)
#define DISPATCH_BFLOAT16(function, ...) DISPATCH_PRODUCTS(function, __VA_ARGS__)
#define DISPATCH_FLOAT16(function, ...) DISPATCH_PRODUCTS(function, __VA_ARGS__)
#define DISPATCH_SPLIT(function, ...) DISPATCH_PRODUCTS(function, __VA_ARGS__)
#endif
