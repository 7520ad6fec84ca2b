// The kernels of forward_sm90.cuh; compiled once for every head size HEAD_DIM (HEAD_SIZES of setup.py).
#include "forward_sm90.cuh"

WITH_EXPANDED(INSTANTIATE_FORWARD_SM90, bf16, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_FORWARD_SM90, fp16, HEAD_DIM)
