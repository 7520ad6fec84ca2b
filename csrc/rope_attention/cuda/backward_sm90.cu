// Compiled once for every head size that setup.py lists beside this file's name, as HEAD_DIM.
#include "backward_sm90.cuh"

WITH_EXPANDED(INSTANTIATE_BACKWARD_SM90, bf16, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_BACKWARD_SM90, fp16, HEAD_DIM)
