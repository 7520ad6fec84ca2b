// The thread pool's hooks and the fallback to one thread.
#include "parallel.h"

#include <new>

#include "comp_kernels/export.h"

namespace {

// Signatures of torch/csrc/stable/c/shim.h (PyTorch 2.10 on).
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*function)(int64_t begin, int64_t end, void* context), void* context);
using GetNumThreads = int32_t (*)(uint32_t* num_threads);

ParallelFor parallel_for = nullptr;
GetNumThreads get_num_threads = nullptr;

struct Job {
  void (*function)(void* context, int64_t worker);
  void* context;
};

void run_range(int64_t begin, int64_t end, void* opaque) {
  const Job& job = *static_cast<Job*>(opaque);
  for (int64_t worker = begin; worker < end; ++worker) job.function(job.context, worker);
}

}  // namespace

namespace comp_kernels {

int64_t num_workers() {
  uint32_t threads = 1;
  if (get_num_threads == nullptr || get_num_threads(&threads) != 0 || threads == 0) return 1;
  return threads;
}

void parallel_run(int64_t workers, void (*function)(void* context, int64_t worker), void* context) {
  Job job{function, context};
  if (workers <= 1 || parallel_for == nullptr) {
    run_range(0, workers, &job);
  } else {
    // Out of memory is all that a worker can throw; torch turns it into a status.
    if (parallel_for(0, workers, /*grain=*/1, run_range, &job) != 0) throw std::bad_alloc();
  }
}

}  // namespace comp_kernels

// Both may be null: everything then runs on the calling thread.
COMP_KERNELS_EXPORT void comp_kernels_cpu_set_threads(void* torch_parallel_for, void* torch_get_num_threads) {
  parallel_for = reinterpret_cast<ParallelFor>(torch_parallel_for);
  get_num_threads = reinterpret_cast<GetNumThreads>(torch_get_num_threads);
}
