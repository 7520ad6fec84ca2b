// The kernels of backward.cuh; compiled once for every head size HEAD_DIM (HEAD_SIZES of setup.py).
#include "backward.cuh"

WITH_EXPANDED(INSTANTIATE_BACKWARD, bf16, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_BACKWARD, fp16, HEAD_DIM)
