// A compiled kernel as the host sees it, and the one place where kernels are launched.
#pragma once

#include <stdint.h>

namespace comp_kernels {

struct Kernel {
  const char* name;      // its extern "C" name, the same in the PTX
  const void* function;  // host stub
  int threads;           // per block
  int shared_bytes;      // dynamic shared memory per block
  int rows;              // rows of the tensor that one block owns, where that has a meaning
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

// Launch on a cudaStream_t, or hand over to the launch hook. Returns null or what went wrong.
const char* launch(const Kernel& kernel, int64_t grid_x, int64_t grid_y, const void* params, int64_t params_bytes,
                   void* stream);

template <typename Params>
const char* launch(const Kernel& kernel, int64_t grid_x, int64_t grid_y, const Params& params, void* stream) {
  return launch(kernel, grid_x, grid_y, &params, sizeof params, stream);
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

// INSTANTIATE_... macros paste their arguments into names; through this one, an argument may be a macro itself.
#define WITH_EXPANDED(instantiate, ...) instantiate(__VA_ARGS__)
