// Marks the functions that Python calls; everything else stays inside the library.
#pragma once

#define COMP_KERNELS_EXPORT extern "C" __attribute__((visibility("default")))
