"""The CUDA library built anew, every object of it: that it builds there, and how long that takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

from comp_kernels._sources import fingerprint

from .session import ROOT, Session


def build(session: Session) -> None:
    """Into OUT/build; the library in use stays. A dry run builds the CPU library, with a compiler that does nothing."""
    folder = session.out.absolute() / "build"
    shutil.rmtree(folder, ignore_errors=True)
    name = "cpu" if session.tiny else "cuda"
    wished = {"COMP_KERNELS_BUILD_CUDA": "0", "CXX": "true"} if session.tiny else {"COMP_KERNELS_BUILD_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build_native", "--build-lib", str(folder), "--build-temp", str(folder)]
    start = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, env=os.environ | wished, capture_output=True, text=True)
    seconds = round(time.monotonic() - start, 1)
    if result.returncode != 0:
        session.say(failed="build", error=result.stderr[-2000:], seconds=seconds)
        raise SystemExit(1)
    lib = folder / "comp_kernels" / "lib"
    library = lib / f"libcomp_kernels_{name}.so"
    size = round(library.stat().st_size / 2**20, 1) if library.exists() else None
    sources = (lib / f"{name}.sources").read_text() == fingerprint(name)
    session.say(library=name, seconds=seconds, mib=size, of_these_sources=sources, said=result.stderr[-500:])
