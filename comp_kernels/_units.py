"""Changing the base of logarithms: kernels count in bits, since exp2 and log2 are what processors have."""

from __future__ import annotations

import math

LOG2E = math.log2(math.e)  # bits per natural unit
LN2 = math.log(2.0)  # natural units per bit
