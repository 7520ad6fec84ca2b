// Codes of the element types that cross the C ABI.
#pragma once

enum {
  COMP_KERNELS_FLOAT32 = 0,
  COMP_KERNELS_FLOAT64 = 1,
  COMP_KERNELS_BFLOAT16 = 2,
  COMP_KERNELS_FLOAT16 = 3,
};
