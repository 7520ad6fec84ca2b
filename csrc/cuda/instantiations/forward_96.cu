#include "../attention_forward.cuh"

INSTANTIATE_FORWARD(bf16, 96)
INSTANTIATE_FORWARD(fp16, 96)
