// Launching, and the entry points that belong to no operator.
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>

#include "comp_kernels/export.h"
#include "kernel.h"

namespace {

// Receives launches instead of the device: name of the kernel, grid, threads, dynamic shared memory, the params struct.
using LaunchHook = const char* (*)(const char* kernel, int64_t grid_x, int64_t grid_y, int64_t threads, int64_t shared_bytes,
                                   const void* params, int64_t params_bytes);
LaunchHook launch_hook = nullptr;
int32_t hook_capability = 0;

}  // namespace

namespace comp_kernels {

const char* failure(const char* format, ...) {
  static thread_local char message[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return message;
}

int compute_capability() {
  if (launch_hook != nullptr) return hook_capability;
  int device = 0, major = 0, minor = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known ? major * 10 + minor : 0;
}

const char* launch(const Kernel& kernel, int64_t grid_x, int64_t grid_y, const void* params, int64_t params_bytes,
                   void* stream) {
  if (grid_x == 0 || grid_y == 0) return nullptr;
  if (grid_x > INT32_MAX || grid_y > 65535) {
    return failure("%s needs a grid of %lld x %lld blocks, CUDA allows 2147483647 x 65535", kernel.name,
                   static_cast<long long>(grid_x), static_cast<long long>(grid_y));
  }
  if (launch_hook != nullptr) {
    return launch_hook(kernel.name, grid_x, grid_y, kernel.threads, kernel.shared_bytes, params, params_bytes);
  }
  cudaError_t error = cudaSuccess;
  if (kernel.shared_bytes > 48 * 1024) {  // more than every device grants unasked
    error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<void*>(params)};
    error = cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)),
                             dim3(kernel.threads), arguments, kernel.shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return nullptr;
  return failure("%s: %s", kernel.name, cudaGetErrorString(error));
}

}  // namespace comp_kernels

// Tests run the kernels on an emulator: with a hook set, nothing goes to a device, and kernels are chosen for the compute
// capability given (80, 90). Null: launch as usual.
COMP_KERNELS_EXPORT void comp_kernels_cuda_set_launch_hook(LaunchHook hook, int32_t capability) {
  launch_hook = hook;
  hook_capability = capability;
}

// What this library was compiled for, for a person: "sm_80 sm_90a PTX".
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_architectures() { return COMP_KERNELS_ARCHITECTURES; }
