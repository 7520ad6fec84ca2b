// The kernels of rope_attention, chosen by element type and head size at compile time; defined in the .cu files beside.
#pragma once

#include "common/cuda/kernel.h"

namespace comp_kernels {

// What a backward kernel makes. Up to kSharedKeysHeadDim channels dK and dV come of one kernel, beyond that of one each.
enum class Gradients { kQueries, kKeysAndValues, kKeys, kValues };
constexpr int kSharedKeysHeadDim = 128;

// kHeadDim: 32, 64, 72, 80, 96, 128, 192 or 256 (float32: 32, 64, 80, 128 or 256); smaller head sizes run in the next larger
// one, its further channels are zero.
template <typename T, int kHeadDim>
Kernel forward_kernel();
template <typename T, int kHeadDim, Gradients kGradients>
Kernel backward_kernel();
template <typename T>  // float32: tf32
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

// The same forward with a grid that stays, and what prepares it; defined when COMP_KERNELS_SM90A.
template <typename T, int kHeadDim>
Kernel persistent_sm90_kernel();
template <typename T>
Kernel prepare_persistent_kernel();

// For short sequences, kHeadDim 64, 72, 80, 96 or 128 and no other head size. kKeys, 64 or 256: for how many they are made.
template <typename T, int kHeadDim, int kKeys>
Kernel short_forward_kernel();
template <typename T, int kHeadDim, int kKeys>
Kernel short_backward_kernel();

constexpr int kMaxHeadDim = 256;

}  // namespace comp_kernels
