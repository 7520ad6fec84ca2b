// The kernels of tile_images.cuh, by element type.
#include "tile_images.cuh"

INSTANTIATE_IMAGES(bf16)
INSTANTIATE_IMAGES(fp16)
