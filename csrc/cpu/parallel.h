// Runs work on the threads of the host program: PyTorch's pool, handed over at load time; without it, serially.
#pragma once

#include <atomic>
#include <cstdint>

namespace comp_kernels {

// Number of workers that `parallel_run` uses at most; fixed for the duration of one call of an operator.
int64_t num_workers();

// Calls function(context, worker) once for every worker in 0 .. workers - 1, on as many threads as there are.
void parallel_run(int64_t workers, void (*function)(void* context, int64_t worker), void* context);

// Calls body(worker, item) for every item; idle workers take the next item, so long and short items balance. Which worker
// takes an item must not change the result. A worker runs its items one after another: scratch memory may be per worker.
template <typename Body>
void parallel_items(int64_t workers, int64_t items, Body&& body) {
  struct Context {
    Body& body;
    int64_t items;
    std::atomic<int64_t> next{0};
  } context{body, items};
  if (workers > items) workers = items;
  parallel_run(
      workers,
      [](void* opaque, int64_t worker) {
        Context& context = *static_cast<Context*>(opaque);
        for (int64_t item; (item = context.next.fetch_add(1, std::memory_order_relaxed)) < context.items;) {
          context.body(worker, item);
        }
      },
      &context);
}

}  // namespace comp_kernels
