#include "../attention_backward.cuh"

INSTANTIATE_BACKWARD(bf16, 64)
INSTANTIATE_BACKWARD(fp16, 64)
