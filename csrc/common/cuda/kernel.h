// A compiled kernel as the host sees it, and the one place where kernels are launched.
#pragma once

#include <stdint.h>

namespace comp_kernels {

// Element types, defined in ptx.cuh and in sinkhorn's entries.cuh.
struct bf16;
struct fp16;
struct fp32;
struct tf32;
struct tf32x3;

struct Kernel {
  const char* name;      // its extern "C" name, the same in the PTX
  const void* function;  // host stub
  int threads;           // per block
  int shared_bytes;      // dynamic shared memory per block
  int rows;              // rows of the tensor that one block owns, where that has a meaning
};

// The config (see DEFINE_KERNEL) of kernels that ask for no dynamic shared memory.
template <int threads, int rows>
struct FixedBlock {
  static constexpr int kThreads = threads, kSharedBytes = 0, kRows = rows;
};

// Of the current device, 80 for 8.0; 0 when there is none.
int compute_capability();

struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block may ask for
  bool cooperative;  // whether all blocks of a launch can be made to run at once
};

// Of the current device, or of the one that stands behind the launch hook; all zero when there is none.
Device device();

// Launch on a cudaStream_t, or hand over to the launch hook. Returns null or what went wrong. dependent (sm_90 on): blocks may start
// before the kernel launched last has ended, as soon as it lets them (let_next_grid_start), and wait by themselves
// (wait_for_grid_before) before they read what it wrote or write anything. Some thread of every block must wait: else this kernel
// could end first, and whatever comes after it take the memory that the one before still uses.
const char* launch(const Kernel& kernel, int64_t grid_x, int64_t grid_y, const void* params, int64_t params_bytes, void* stream,
                   bool dependent);

template <typename Params>
const char* launch(const Kernel& kernel, int64_t grid_x, int64_t grid_y, const Params& params, void* stream,
                   bool dependent = false) {
  return launch(kernel, grid_x, grid_y, &params, sizeof params, stream, dependent);
}

// The same with blocks that all run at once and may wait for each other. `refused`: set where the device
// cannot hold that many, as under a limit of its multiprocessors; nothing was launched then, and that is no failure.
const char* launch_cooperative(const Kernel& kernel, int64_t grid_x, int64_t grid_y, const void* params, int64_t params_bytes,
                               void* stream, bool* refused);

// Zeros in device memory, in the order of the stream.
const char* clear(void* memory, int64_t bytes, void* stream);

// A message that lives until the thread's next call.
__attribute__((format(printf, 1, 2))) const char* failure(const char* format, ...);

}  // namespace comp_kernels

// A kernel named `symbol` in C, which runs function<arguments>(params), and kernel<arguments>(), which returns its Kernel.
// arguments, config: in parentheses, for they may hold commas. config: a type with kThreads, kSharedBytes and, named by `rows`,
// the rows of a block. Behind these: how many blocks a multiprocessor must hold, where that is asked for.
#define DEFINE_KERNEL(symbol, Params, function, kernel, arguments, config, rows, ...)                              \
  namespace comp_kernels {                                                                                         \
  using symbol##_config = BARE config;                                                                             \
  extern "C" __global__ void __launch_bounds__(symbol##_config::kThreads __VA_OPT__(, ) __VA_ARGS__)               \
      symbol(const __grid_constant__ Params params) {                                                              \
    function<BARE arguments>(params);                                                                              \
  }                                                                                                                \
  template <>                                                                                                      \
  Kernel kernel<BARE arguments>() {                                                                                \
    using Config = symbol##_config;                                                                                \
    return {#symbol, reinterpret_cast<const void*>(symbol), Config::kThreads, Config::kSharedBytes, Config::rows}; \
  }                                                                                                                \
  }
#define BARE(...) __VA_ARGS__

// INSTANTIATE_... macros paste their arguments into names; through this one, an argument may be a macro itself.
#define WITH_EXPANDED(instantiate, ...) instantiate(__VA_ARGS__)
