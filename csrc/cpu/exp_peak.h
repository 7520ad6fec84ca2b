// Declares the loop that measures the peak rate of exponentials.
#pragma once

#include <cstdint>

#include "isa.h"

// Takes `rounds` times the exponentials of floats in the first level cache on every thread; returns how many that were.
DECLARE_PER_ISA(double exp_peak_exponentials(int64_t rounds))
