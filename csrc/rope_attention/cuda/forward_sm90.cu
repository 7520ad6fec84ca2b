// Compiled once for every head size that setup.py lists beside this file's name, as HEAD_DIM.
#include "forward_sm90.cuh"

WITH_EXPANDED(INSTANTIATE_FORWARD_SM90, bf16, HEAD_DIM)
WITH_EXPANDED(INSTANTIATE_FORWARD_SM90, fp16, HEAD_DIM)
