"""compute-sanitizer over a few of tests/gpu: accesses out of bounds (memcheck), races in shared memory (racecheck)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from .session import ROOT, Session

CHOSEN = (  # with -k: small calls of every CUDA kernel; under the sanitizer each takes seconds
    "against_float64 and (cuda-bfloat16-slack_of_nan_cross or cuda-bfloat16-gqa_64 or cuda-bfloat16-views_72 "
    "or cuda-odd-float32 or cuda-marginals_per_item-bfloat16) or through_the_iterations and cuda"
)
TINY = "against_float64 and cpu-bfloat16-cross"


def run(session: Session) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None and not session.tiny:
        session.say(failed="compute-sanitizer", error="not installed")
        return
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", str(ROOT / "tests" / "gpu")]
    tests += ["-k", TINY if session.tiny else CHOSEN]
    # Every tensor gets memory of its own, or an access beyond its end would hit another one's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for check in ("memcheck", "racecheck"):
        sanitizer = [] if session.tiny else [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "20"]
        result = subprocess.run([*sanitizer, *tests], cwd=ROOT, env=environment, capture_output=True, text=True)
        summary = re.findall(r"=+ (.*SUMMARY.*)", result.stdout + result.stderr)
        passed = re.findall(r"(\d+) passed", result.stdout)
        session.say(tool=check, code=result.returncode, passed=int(passed[-1]) if passed else 0, summary="; ".join(summary))
        if result.returncode != 0:
            failed = True
            session.say(failed=check, error=(result.stdout + result.stderr)[-2000:])
    if failed:
        raise SystemExit(1)
