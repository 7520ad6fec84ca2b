#include "../attention_forward_sm90.cuh"

INSTANTIATE_FORWARD_SM90(bf16, 80)
INSTANTIATE_FORWARD_SM90(fp16, 80)
