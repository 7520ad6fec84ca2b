#include "../attention_forward_sm90.cuh"

INSTANTIATE_FORWARD_SM90(bf16, 72)
INSTANTIATE_FORWARD_SM90(fp16, 72)
