#include "../attention_backward.cuh"

INSTANTIATE_BACKWARD(bf16, 80)
INSTANTIATE_BACKWARD(fp16, 80)
