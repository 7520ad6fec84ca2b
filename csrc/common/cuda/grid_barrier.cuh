// A barrier of blocks that all run at once (a cooperative launch), through one counter in global memory.
#pragma once

#include <stdint.h>

namespace comp_kernels {

// Returns once `target` arrivals have been counted; what any of the blocks wrote before theirs is visible afterwards. The counter
// starts at zero and is never reset: the n-th barrier of m blocks has target n m. All threads of a block call it.
__device__ __forceinline__ void grid_barrier(uint32_t* counter, uint32_t target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    uint32_t arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    } while (static_cast<int32_t>(arrived - target) < 0);
    __threadfence();
  }
  __syncthreads();
}

}  // namespace comp_kernels
