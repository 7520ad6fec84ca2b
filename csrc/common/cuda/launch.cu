// Launching, and the entry points that belong to no operator.
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>

#include "comp_kernels/export.h"
#include "kernel.h"

namespace {

// Receives launches instead of the device: name of the kernel, grid, threads, dynamic shared memory, kind of launch, the params
// struct. Or the name "clear", memory to be zeroed and its bytes in the place of the struct.
enum LaunchKind { kPlain, kCooperative, kDependent };
using LaunchHook = const char* (*)(const char* kernel, int64_t grid_x, int64_t grid_y, int64_t threads, int64_t shared_bytes,
                                   int64_t kind, const void* params, int64_t params_bytes);
LaunchHook launch_hook = nullptr;
int32_t hook_capability = 0;
comp_kernels::Device hook_device{};

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, which, device) == cudaSuccess;
  return known ? value : 0;
}

cudaError_t allow_shared(const comp_kernels::Kernel& kernel) {
  if (kernel.shared_bytes <= 48 * 1024) return cudaSuccess;  // what every device grants unasked
  return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
}

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
  return attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
}

Device device() {
  if (launch_hook != nullptr) return hook_device;
  static thread_local int known = -1;  // its facts never change
  static thread_local Device facts{};
  int current = 0;
  if (cudaGetDevice(&current) != cudaSuccess) return {};
  if (current != known) {
    facts = {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
             attribute(cudaDevAttrCooperativeLaunch) != 0};
    known = current;
  }
  return facts;
}

const char* launch(const Kernel& kernel, int64_t grid_x, int64_t grid_y, const void* params, int64_t params_bytes, void* stream,
                   bool dependent) {
  if (grid_x == 0 || grid_y == 0) return nullptr;
  if (grid_x > INT32_MAX || grid_y > 65535) {
    return failure("%s needs a grid of %lld x %lld blocks, CUDA allows 2147483647 x 65535", kernel.name,
                   static_cast<long long>(grid_x), static_cast<long long>(grid_y));
  }
  if (launch_hook != nullptr) {
    return launch_hook(kernel.name, grid_x, grid_y, kernel.threads, kernel.shared_bytes, dependent ? kDependent : kPlain, params,
                       params_bytes);
  }
  cudaError_t error = allow_shared(kernel);
  if (error == cudaSuccess) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
    config.blockDim = dim3(kernel.threads);
    config.dynamicSmemBytes = kernel.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early;
    config.numAttrs = dependent ? 1 : 0;
    void* arguments[] = {const_cast<void*>(params)};
    error = cudaLaunchKernelExC(&config, kernel.function, arguments);
  }
  if (error == cudaSuccess) return nullptr;
  return failure("%s: %s", kernel.name, cudaGetErrorString(error));
}

const char* launch_cooperative(const Kernel& kernel, int64_t grid_x, int64_t grid_y, const void* params, int64_t params_bytes,
                               void* stream, bool* refused) {
  *refused = false;
  if (launch_hook != nullptr) {
    return launch_hook(kernel.name, grid_x, grid_y, kernel.threads, kernel.shared_bytes, kCooperative, params, params_bytes);
  }
  cudaError_t error = allow_shared(kernel);
  int per_multiprocessor = 0;
  if (error == cudaSuccess) {
    error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel.function, kernel.threads, kernel.shared_bytes);
  }
  if (error == cudaSuccess && static_cast<int64_t>(per_multiprocessor) * device().multiprocessors < grid_x * grid_y) {
    *refused = true;
    return nullptr;
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<void*>(params)};
    error = cudaLaunchCooperativeKernel(kernel.function, dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)),
                                        dim3(kernel.threads), arguments, kernel.shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return nullptr;
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) {
    cudaGetLastError();  // so that nobody after us is told of it
    *refused = true;
    return nullptr;
  }
  return failure("%s: %s", kernel.name, cudaGetErrorString(error));
}

const char* clear(void* memory, int64_t bytes, void* stream) {
  if (launch_hook != nullptr) return launch_hook("clear", 0, 0, 0, 0, kPlain, memory, bytes);
  const cudaError_t error = cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : failure("clearing a workspace: %s", cudaGetErrorString(error));
}

}  // namespace comp_kernels

// Tests run the kernels on an emulator: with a hook set, nothing goes to a device, memory is the host's, and kernels are chosen for
// the compute capability given (80, 90), as for an A100 or H200. Null: launch as usual.
COMP_KERNELS_EXPORT void comp_kernels_cuda_set_launch_hook(LaunchHook hook, int32_t capability) {
  launch_hook = hook;
  hook_capability = capability;
  hook_device = capability >= 90 ? comp_kernels::Device{132, 227 * 1024, true} : comp_kernels::Device{108, 163 * 1024, true};
}

// Another device behind the hook, until the hook is set again.
COMP_KERNELS_EXPORT void comp_kernels_cuda_set_hook_device(int32_t multiprocessors, int32_t shared_bytes, int32_t cooperative) {
  hook_device = {multiprocessors, shared_bytes, cooperative != 0};
}

// What this library was compiled for, for a person: "sm_80 sm_90a PTX".
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_architectures() { return COMP_KERNELS_ARCHITECTURES; }
