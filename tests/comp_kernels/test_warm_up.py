"""Compiling ahead: into Triton's cache and found there, once per kernel; errors in words. What models need is in
tests/comp_kernels/integrations/test_warm_up_models.py."""

import json
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from emulation import run_compiled

import comp_kernels as ck
from comp_kernels import warm_up
from comp_kernels._triton_compile import compilations_go_to, compile_ahead, compile_launch, record

pytestmark = pytest.mark.compiles


def sinkhorn_call():
    ck.sinkhorn(torch.zeros(2, 40, 64), epsilon=0.1, num_iters=2, backend="triton")


def twice_and_as_a_launch_would(folder: str) -> tuple:
    """What is compiled first, what the second time, and what a launch then finds; in a cache of its own, in two processes."""
    launches = record(sinkhorn_call, "sm_80")
    seen = []
    with patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        first, second = (list(compile_ahead(launches, "sm_80", jobs=2)) for _ in range(2))
        for launch in launches:
            launch.kernel.device_caches.clear()  # what other tests of this process left in memory
        with compilations_go_to(lambda *facts: seen.append(facts)):
            hashes = {launch.name: compile_launch(launch, "sm_80").hash for launch in launches}
    return len(launches), first, second, seen, hashes


def test_what_was_compiled_ahead_is_found(tmp_path):
    launches, first, second, seen, hashes = run_compiled(twice_and_as_a_launch_would, str(tmp_path / "cache"))
    names = ["column_step_kernel", "merge_rows_kernel", "plan_kernel"]
    assert launches == 5 and [kernel.name for kernel in first] == names  # two iterations launch the same two kernels
    assert not any(kernel.from_cache for kernel in first) and all(kernel.seconds > 0 for kernel in first)
    assert all(kernel.from_cache for kernel in second)
    assert {kernel.name: kernel.hash for kernel in first} == {kernel.name: kernel.hash for kernel in second} == hashes
    assert [(name, arch, from_cache) for name, arch, _, from_cache in seen] == [(name, "sm_80", True) for name in names]
    assert len(list((tmp_path / "cache").glob("*/*.cubin"))) == len(names)


def say_what_happens(folder: str) -> list[str]:
    lines: list[str] = []
    with patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        assert warm_up.warm_up(sinkhorn_call, "sm_120", jobs=1, say=lines.append) == 3
        assert warm_up.warm_up(sinkhorn_call, "sm_120", jobs=1, say=lines.append) == 3
    return lines


def test_a_line_per_kernel(tmp_path):
    lines = run_compiled(say_what_happens, str(tmp_path))
    assert lines[0].startswith("column_step_kernel: ") and lines[0].endswith(" s")
    assert lines[3].startswith("3 kernels for sm_120, 3 of them compiled, in ")
    assert lines[4:7] == [f"{name}: was there" for name in ("column_step_kernel", "merge_rows_kernel", "plan_kernel")]
    assert lines[7].startswith("3 kernels for sm_120, 0 of them compiled, in ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to compile for")
def test_needs_a_gpu_or_an_architecture():
    with pytest.raises(ValueError, match='arch must be given where there is no GPU: "sm_80"'):
        warm_up.warm_up(sinkhorn_call)


@pytest.mark.parametrize("jobs", [0, -3])
def test_fewer_jobs_than_one_are_refused(jobs):
    with pytest.raises(ValueError, match=f"jobs must be at least 1, got {jobs}"):
        warm_up.warm_up(sinkhorn_call, "sm_90", jobs=jobs)


def test_command_line_says_what_is_wrong(tmp_path):
    def run(*arguments):
        done = subprocess.run([sys.executable, "-m", "comp_kernels.warm_up", *arguments], capture_output=True, text=True)
        return done.returncode, done.stderr

    code, error = run(str(tmp_path), "--arch", "sm_90")
    assert code == 2 and "config.json" in error and "Traceback" not in error
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}))
    code, error = run(str(tmp_path), "--arch", "sm_90")
    assert code == 2 and "no attention module that is known here" in error
