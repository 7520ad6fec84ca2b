"""A fingerprint of csrc, so that a library built from other sources than the ones at hand is noticed and not called.

Used by setup.py, which runs this file alone (no torch in its environment), and by `_native`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")


def fingerprint(library: str) -> str | None:
    """Digest of csrc/include and csrc/{library}; None where the sources are not at hand (an installed wheel)."""
    if not (CSRC / "include" / "comp_kernels").is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("include", library) for path in (CSRC / folder).rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
