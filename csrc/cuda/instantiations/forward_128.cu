#include "../attention_forward.cuh"

INSTANTIATE_FORWARD(bf16, 128)
INSTANTIATE_FORWARD(fp16, 128)
