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

// Calls body(worker, draw) once per worker; draw() hands out items, each once, and then -1. The i-th item of a worker's own is
// item_of(worker, i), -1 beyond the last. Workers that are done take what others have left. Which worker draws an item must not
// change the result.
template <typename ItemOf, typename Body>
void parallel_owned(int64_t workers, const ItemOf& item_of, Body&& body) {
  struct Context {
    const ItemOf& item_of;
    Body& body;
    int64_t workers;
    std::vector<std::atomic<int64_t>> taken;  // of each worker's
  } context{item_of, body, workers, std::vector<std::atomic<int64_t>>(workers)};
  parallel_run(
      workers,
      [](void* opaque, int64_t worker) {
        Context& context = *static_cast<Context*>(opaque);
        context.body(worker, [&context, worker, step = int64_t{0}]() mutable -> int64_t {
          for (; step < context.workers; ++step) {
            const int64_t owner = (worker + step) % context.workers;
            const int64_t item = context.item_of(owner, context.taken[owner].fetch_add(1, std::memory_order_relaxed));
            if (item >= 0) return item;
          }
          return -1;
        });
      },
      &context);
}

// The items are 0 .. items - 1, dealt out `together` neighbours at a time: long and short ones balance where the long come first.
template <typename Body>
void parallel_draws(int64_t workers, int64_t items, int64_t together, Body&& body) {
  if (workers > items) workers = items;
  const auto item_of = [=](int64_t owner, int64_t i) {
    const int64_t item = (i / together * workers + owner) * together + i % together;
    return item < items ? item : -1;
  };
  parallel_owned(workers, item_of, body);
}

// Calls body(worker, item) for every item. A worker runs its items one after another: scratch memory may be per worker.
template <typename Body>
void parallel_items(int64_t workers, int64_t items, Body&& body) {
  parallel_draws(workers, items, /*together=*/1, [&](int64_t worker, auto draw) {
    for (int64_t item; (item = draw()) >= 0;) body(worker, item);
  });
}

// As parallel_items, but every worker starts with a share of its own, neighbouring items and the same ones in every call, so that
// they are still in its caches; `backwards` takes each share from its end.
template <typename Body>
void parallel_shares(int64_t workers, int64_t items, bool backwards, Body&& body) {
  if (workers > items) workers = items;
  const auto item_of = [=](int64_t owner, int64_t i) -> int64_t {
    const int64_t begin = owner * items / workers, end = (owner + 1) * items / workers;
    return i >= end - begin ? -1 : backwards ? end - 1 - i : begin + i;
  };
  parallel_owned(workers, item_of, [&](int64_t worker, auto draw) {
    for (int64_t item; (item = draw()) >= 0;) body(worker, item);
  });
}

}  // namespace comp_kernels
