// Compiled once for every head size that setup.py lists beside this file's name, as HEAD_DIM.
#include "backward.cuh"

WITH_EXPANDED(INSTANTIATE_BACKWARD, bf16, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_BACKWARD, fp16, HEAD_DIM)
