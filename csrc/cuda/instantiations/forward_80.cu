#include "../attention_forward.cuh"

INSTANTIATE_FORWARD(bf16, 80)
INSTANTIATE_FORWARD(fp16, 80)
