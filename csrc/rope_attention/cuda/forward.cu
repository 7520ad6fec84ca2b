// The kernels of forward.cuh; compiled once for every head size HEAD_DIM (HEAD_SIZES of setup.py).
#include "forward.cuh"

WITH_EXPANDED(INSTANTIATE_FORWARD, bf16, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_FORWARD, fp16, HEAD_DIM)
