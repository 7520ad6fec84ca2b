#include "../attention_forward.cuh"

INSTANTIATE_FORWARD(bf16, 32)
INSTANTIATE_FORWARD(fp16, 32)
