// Results below the range of normal numbers: zero, where a loop can do without them.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace comp_kernels::COMP_KERNELS_ISA {

// While this lives, subnormal results of the calling thread's arithmetic are zero; subnormal operands count as what they are.
// Intel's processors take some 150 cycles for an instruction that makes or reads one. ARM's do not mind.
class NoSubnormalResults {
 public:
#if defined(__SSE2__)
  NoSubnormalResults() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~NoSubnormalResults() { _mm_setcsr(before_); }
#else
  NoSubnormalResults() {}
#endif
  NoSubnormalResults(const NoSubnormalResults&) = delete;
  NoSubnormalResults& operator=(const NoSubnormalResults&) = delete;

 private:
#if defined(__SSE2__)
  unsigned before_;
#endif
};

}  // namespace comp_kernels::COMP_KERNELS_ISA
