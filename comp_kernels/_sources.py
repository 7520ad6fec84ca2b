"""What the build, the package and the benchmarks all have to know of csrc: its flags, and a fingerprint of its files.

setup.py runs this file alone: there is no torch in its environment.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
INCLUDES = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-ffp-contract=fast", *INCLUDES]
X86_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"],
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 -mtune=icelake-server".split(),
}
"""By instruction set; files of csrc/*/cpu/kernels are compiled once for each."""
_BFLOAT16 = [*X86_FLAGS["avx512"], "-mavx512bf16"]
_TILES = [*_BFLOAT16, "-mamx-tile", "-mamx-bf16"]
PAIRS_FLAGS = {
    "avx512_bf16": [*_BFLOAT16, "-DCOMP_KERNELS_PAIRS=bfloat16"],
    "amx": [*_TILES, "-DCOMP_KERNELS_PAIRS=bfloat16", "-DCOMP_KERNELS_TILES=bf16"],
    "amx_bf16x3": [*_TILES, "-DCOMP_KERNELS_PAIRS=bfloat16", "-DCOMP_KERNELS_TILES=bf16", "-DCOMP_KERNELS_TERMS"],
    "amx_fp16": [*_TILES, "-DCOMP_KERNELS_PAIRS=float16", "-DCOMP_KERNELS_TILES=fp16"],
}
"""Of the sets that multiply 16-bit numbers in pairs, for attention alone; left out where the compiler does not know them
(GCC before 11)."""


def fingerprint(library: str) -> str | None:
    """Digest of csrc/include and csrc/*/{library}, so that a library built from other files is noticed and not called; None
    where the sources are not at hand (an installed wheel)."""
    if not (CSRC / "include" / "comp_kernels").is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*CSRC.glob("include/**/*"), *CSRC.glob(f"*/{library}/**/*")]):
        if path.suffix not in SUFFIXES:
            continue
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
