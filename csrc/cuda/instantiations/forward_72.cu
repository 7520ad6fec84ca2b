#include "../attention_forward.cuh"

INSTANTIATE_FORWARD(bf16, 72)
INSTANTIATE_FORWARD(fp16, 72)
