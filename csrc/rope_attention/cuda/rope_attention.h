// The kernels of rope_attention, chosen by element type and head size at compile time; defined in the .cu files beside.
#pragma once

#include "common/cuda/kernel.h"

namespace comp_kernels {

struct bf16;
struct fp16;

// kHeadDim: 32, 64, 72, 80, 96 or 128; smaller head sizes run in the next larger one, its further channels are zero.
template <typename T, int kHeadDim>
Kernel forward_kernel();
template <typename T, int kHeadDim, bool kKeyRows>
Kernel backward_kernel();
template <typename T>
Kernel prepare_kernel();

// For compute capability 9.0, kHeadDim 64, 72, 80, 96 or 128 and no other head size; defined when COMP_KERNELS_SM90A.
template <typename T, int kHeadDim>
Kernel forward_sm90_kernel();
template <typename T, int kHeadDim, bool kKeyRows>
Kernel backward_sm90_kernel();
template <typename T>
Kernel prepare_sm90_kernel();
template <typename T>
Kernel images_kernel();

// For short sequences, kHeadDim 64, 72, 80, 96 or 128 and no other head size. kKeys, 64 or 256: for how many they are made.
template <typename T, int kHeadDim, int kKeys>
Kernel short_forward_kernel();
template <typename T, int kHeadDim, int kKeys>
Kernel short_backward_kernel();

constexpr int kMaxHeadDim = 128;

}  // namespace comp_kernels
