#include "../attention_backward.cuh"

INSTANTIATE_BACKWARD(bf16, 72)
INSTANTIATE_BACKWARD(fp16, 72)
