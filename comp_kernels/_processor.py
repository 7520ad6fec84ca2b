"""What the processor says of itself, where the system tells (Linux)."""

from __future__ import annotations

import functools
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
FAST_BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}  # the last on ARM


def words() -> set[str]:
    """The words of /proc/cpuinfo, flags among them; none on other systems."""
    try:
        return set(CPU_INFO.read_text().split())
    except OSError:
        return set()


@functools.cache
def is_intel() -> bool:
    """Whether the processor is known to be Intel's."""
    return "GenuineIntel" in words()


def has_fast_bfloat16() -> bool | None:
    """Whether products of bfloat16 are faster than those of float32; None where nobody tells.

    Those of AVX512_BF16 on Intel's processors, which do half the operations per second that float32 does, are not
    (findings/intel_bfloat16_dot_is_slower_than_float32.sh).
    """
    known = words()
    if not known:
        return None
    return not known.isdisjoint(FAST_BFLOAT16 - {"avx512_bf16"} if "GenuineIntel" in known else FAST_BFLOAT16)
