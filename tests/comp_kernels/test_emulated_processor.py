"""tests/emulated_cpu without an emulator: calls that go to a process of this processor and back give the usual results."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comp_kernels import _native

REPOSITORY = Path(__file__).parents[2]
FILES = (
    "rope_attention/test_rope_attention_cpu.py",
    "sinkhorn/test_sinkhorn.py",
    "sinkhorn/test_sinkhorn_small.py",
    "alignment_loss",
)
CHOSEN = (
    "test_error_budget and (gqa or awkward) or test_a_single_exponent and 126 or test_equals_the_definition_with_eps"
    " or test_matches_the_definition_in_every_dtype"
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: the process is not built")
def test_every_operator(tmp_path):
    program, csrc = tmp_path / "serve_calls", REPOSITORY / "csrc"
    source = REPOSITORY / "tests" / "emulated_cpu" / "serve_calls.cpp"
    options = ["-std=c++17", "-pthread", f"-I{csrc}", f"-I{csrc / 'include'}", "-L", str(_native.LIB), "-lcomp_kernels_cpu"]
    subprocess.run(["g++", str(source), "-o", str(program), *options, f"-Wl,-rpath,{_native.LIB}"], check=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"COMP_KERNELS_EMULATED": str(program), "PYTHONPATH": str(REPOSITORY)}
    tests = [f"tests/comp_kernels/{file}" for file in FILES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.emulated_cpu.plugin",
        *tests,
        "-k",
        CHOSEN,
    ]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
