// C entry points of sinkhorn: run the variant for this processor. All return null, or what went wrong.
#include "sinkhorn.h"

#include "common/cpu/parallel.h"
#include "marginals.h"

#include "comp_kernels/export.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// Fresh memory costs a page fault per page when it is first written: at 4 KiB that takes longer than the whole computation.
// Asks for 2 MiB pages; only a hint. Where all threads work on one matrix, each touches its share of the pages first: two that
// meet in one page would both clear it.
void prepare_memory(const comp_kernels_sinkhorn_params& p) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHuge = int64_t{1} << 21;
  const int64_t bytes = p.num_items * p.num_rows * p.num_cols * (p.dtype == COMP_KERNELS_FLOAT64 ? 8 : 4);
  char* first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p.plan) + kHuge - 1) / kHuge * kHuge);
  const int64_t pages = (static_cast<char*>(p.plan) + bytes - first) / kHuge, workers = comp_kernels::num_workers();
  if (pages <= 0) return;
  madvise(first, pages * kHuge, MADV_HUGEPAGE);
  if (workers == 1 || p.num_items >= workers) return;
  comp_kernels::parallel_shares(workers, pages, /*backwards=*/false, [&](int64_t, int64_t page) { first[page * kHuge] = 0; });
#else
  (void)p;
#endif
}

}  // namespace

// All iterations, the potentials and the plan.
COMP_KERNELS_EXPORT const char* comp_kernels_cpu_sinkhorn_solve(const comp_kernels_sinkhorn_params* params) {
  return comp_kernels::with_marginals(*params, [](const auto& p) {
    prepare_memory(p);
    return DISPATCH_ISA(sinkhorn_solve, p);
  });
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
