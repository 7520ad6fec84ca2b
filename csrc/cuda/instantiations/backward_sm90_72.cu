#include "../attention_backward_sm90.cuh"

INSTANTIATE_BACKWARD_SM90(bf16, 72)
INSTANTIATE_BACKWARD_SM90(fp16, 72)
