// What prepares the kernels of persistent_sm90.cuh, by element type.
#include "persistent_sm90.cuh"

INSTANTIATE_PREPARE_PERSISTENT(bf16)
INSTANTIATE_PREPARE_PERSISTENT(fp16)
