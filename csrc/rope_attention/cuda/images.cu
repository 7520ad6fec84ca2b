#include "tile_images.cuh"

INSTANTIATE_IMAGES(bf16)
INSTANTIATE_IMAGES(fp16)
