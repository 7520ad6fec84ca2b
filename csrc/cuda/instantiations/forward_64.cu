#include "../attention_forward.cuh"

INSTANTIATE_FORWARD(bf16, 64)
INSTANTIATE_FORWARD(fp16, 64)
