// Compiled once for every head size that setup.py lists beside this file's name, as HEAD_DIM.
#include "forward.cuh"

WITH_EXPANDED(INSTANTIATE_FORWARD, bf16, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_FORWARD, fp16, HEAD_DIM)
