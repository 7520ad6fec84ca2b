#include "../attention_backward.cuh"

INSTANTIATE_BACKWARD(bf16, 128)
INSTANTIATE_BACKWARD(fp16, 128)
