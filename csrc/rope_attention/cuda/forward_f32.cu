// The kernels of forward.cuh for float32; compiled once for every head size HEAD_DIM (HEAD_SIZES of setup.py).
#include "forward.cuh"

WITH_EXPANDED(INSTANTIATE_FORWARD, tf32, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_FORWARD, tf32x3, HEAD_DIM)
