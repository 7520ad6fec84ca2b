// Declares the loop that measures the peak rate of multiply-adds.
#pragma once

#include <cstdint>

#include "isa.h"

// Runs `steps` rounds of independent float multiply-adds (or dot products of pairs of bfloat16) on every thread; returns the
// floating-point operations done.
DECLARE_PER_ISA(double fma_peak_operations(int64_t steps))
DECLARE_BFLOAT16(double fma_peak_operations(int64_t steps))
