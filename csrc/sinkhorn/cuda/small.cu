// The kernels of small.cuh, by element type.
#include "small.cuh"

INSTANTIATE_SINKHORN_SMALL(fp32)
INSTANTIATE_SINKHORN_SMALL(bf16)
INSTANTIATE_SINKHORN_SMALL(fp16)
