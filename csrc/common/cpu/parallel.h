// Runs work on the threads of the host program: PyTorch's pool, handed over at load time; without it, serially.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace comp_kernels {

// Number of workers that `parallel_run` uses at most; fixed for the duration of one call of an operator.
int64_t num_workers();

// Calls function(context, worker) once for every worker in 0 .. workers - 1, on as many threads as there are.
void parallel_run(int64_t workers, void (*function)(void* context, int64_t worker), void* context);

// Calls body(worker, draw) once per worker; draw() hands out the items 0 .. items - 1, each once, and then -1. Items are dealt out
// `together` neighbours at a time, and workers that are done take what others have left, so long and short items balance where the
// long ones come first. Which worker draws an item must not change the result.
template <typename Body>
void parallel_draws(int64_t workers, int64_t items, int64_t together, Body&& body) {
  if (workers > items) workers = items;
  struct Context {
    Body& body;
    int64_t workers, items, together;
    std::vector<std::atomic<int64_t>> taken;  // of each worker's
  } context{body, workers, items, together, std::vector<std::atomic<int64_t>>(workers)};
  parallel_run(
      workers,
      [](void* opaque, int64_t worker) {
        Context& context = *static_cast<Context*>(opaque);
        context.body(worker, [&context, worker, step = int64_t{0}]() mutable -> int64_t {
          for (; step < context.workers; ++step) {
            const int64_t owner = (worker + step) % context.workers;
            const int64_t i = context.taken[owner].fetch_add(1, std::memory_order_relaxed), deal = i / context.together;
            const int64_t item = (deal * context.workers + owner) * context.together + i % context.together;
            if (item < context.items) return item;
          }
          return -1;
        });
      },
      &context);
}

// Calls body(worker, item) for every item. A worker runs its items one after another: scratch memory may be per worker.
template <typename Body>
void parallel_items(int64_t workers, int64_t items, Body&& body) {
  parallel_draws(workers, items, /*together=*/1, [&](int64_t worker, auto draw) {
    for (int64_t item; (item = draw()) >= 0;) body(worker, item);
  });
}

// As parallel_items, but every worker starts with a share of its own, neighbouring items and the same ones in every call, so that
// they are still in its caches; `backwards` takes each share from its end. Workers that are done help the others.
template <typename Body>
void parallel_shares(int64_t workers, int64_t items, bool backwards, Body&& body) {
  struct Context {
    Body& body;
    int64_t workers, items;
    bool backwards;
    std::vector<std::atomic<int64_t>> taken;
  } context{body, workers < items ? workers : items, items, backwards, std::vector<std::atomic<int64_t>>(workers)};
  parallel_run(
      context.workers,
      [](void* opaque, int64_t worker) {
        Context& context = *static_cast<Context*>(opaque);
        for (int64_t step = 0; step < context.workers; ++step) {
          const int64_t share = (worker + step) % context.workers;
          const int64_t begin = share * context.items / context.workers, end = (share + 1) * context.items / context.workers;
          for (int64_t i; (i = context.taken[share].fetch_add(1, std::memory_order_relaxed)) < end - begin;) {
            context.body(worker, context.backwards ? end - 1 - i : begin + i);
          }
        }
      },
      &context);
}

}  // namespace comp_kernels
