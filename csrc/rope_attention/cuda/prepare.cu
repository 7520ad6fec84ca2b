// The kernels of prepare.cuh, by element type.
#include "prepare.cuh"

INSTANTIATE_PREPARE(bf16)
INSTANTIATE_PREPARE(fp16)
INSTANTIATE_PREPARE(tf32)
