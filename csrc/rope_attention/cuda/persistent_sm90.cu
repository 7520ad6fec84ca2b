// The kernels of persistent_sm90.cuh; compiled once for every head size HEAD_DIM (HEAD_SIZES of setup.py).
#include "persistent_sm90.cuh"

WITH_EXPANDED(INSTANTIATE_PERSISTENT, bf16, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_PERSISTENT, fp16, HEAD_DIM)
