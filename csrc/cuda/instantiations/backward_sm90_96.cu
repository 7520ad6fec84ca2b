#include "../attention_backward_sm90.cuh"

INSTANTIATE_BACKWARD_SM90(bf16, 96)
INSTANTIATE_BACKWARD_SM90(fp16, 96)
