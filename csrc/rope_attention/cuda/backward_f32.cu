// The kernels of backward.cuh for float32; compiled once for every head size HEAD_DIM (HEAD_SIZES of setup.py).
#include "backward.cuh"

WITH_EXPANDED(INSTANTIATE_BACKWARD, tf32, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_BACKWARD, tf32x3, HEAD_DIM)
