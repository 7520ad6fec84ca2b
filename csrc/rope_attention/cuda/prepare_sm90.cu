// The kernels of prepare_sm90.cuh, by element type.
#include "prepare_sm90.cuh"

INSTANTIATE_PREPARE_SM90(bf16)
INSTANTIATE_PREPARE_SM90(fp16)
