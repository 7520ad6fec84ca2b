#include "../attention_backward.cuh"

INSTANTIATE_BACKWARD(bf16, 96)
INSTANTIATE_BACKWARD(fp16, 96)
