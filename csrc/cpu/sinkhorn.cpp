// C entry points of sinkhorn: run the variant for this processor. All return null, or what went wrong.
#include "sinkhorn.h"

#include "comp_kernels/export.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// Fresh memory costs a page fault per page when it is first written: at 4 KiB that takes longer than the whole computation.
// Asks for 2 MiB pages; only a hint.
void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace

// All iterations, the potentials and, where wanted, the plan.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_sinkhorn_solve(const comp_kernels_sinkhorn_params* params) {
  const int64_t element = params->dtype == COMP_KERNELS_FLOAT64 ? 8 : 4;
  if (params->plan) advise_huge_pages(params->plan, params->num_items * params->num_rows * params->num_cols * element);
  return DISPATCH_ISA(sinkhorn_solve, *params);
}

// Columns of the tile to their marginals, v2_new; and per row the sum of the plan after that, from which the caller scales rows.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_sinkhorn_iterate(const comp_kernels_sinkhorn_step_params* params) {
  return DISPATCH_ISA(sinkhorn_iterate, *params);
}

// peaks, sums [K] of the entries plus u2 of each column.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_sinkhorn_column_statistics(const comp_kernels_sinkhorn_step_params* params) {
  return DISPATCH_ISA(sinkhorn_column_statistics, *params);
}

// Merges the entries plus v2 of each row into peaks, sums [n]; start them with -inf and 0. Rows with u2 = -inf are left alone.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_sinkhorn_row_statistics(const comp_kernels_sinkhorn_step_params* params) {
  return DISPATCH_ISA(sinkhorn_row_statistics, *params);
}

// plan = 2^(entry + u2 + v2).
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_sinkhorn_plan(const comp_kernels_sinkhorn_step_params* params) {
  return DISPATCH_ISA(sinkhorn_plan, *params);
}
