#include "../attention_backward.cuh"

INSTANTIATE_BACKWARD(bf16, 32)
INSTANTIATE_BACKWARD(fp16, 32)
