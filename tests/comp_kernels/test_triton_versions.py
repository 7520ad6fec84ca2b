"""benchmarks/triton_versions.py without other versions of Triton: what it would compile, and what it calls a failure."""

import dataclasses
import json
import subprocess

import pytest
import torch
from emulation import run_compiled
from kernel_names import KERNELS

from benchmarks import triton_versions as versions
from comp_kernels import sinkhorn
from comp_kernels.ops.rope_attention import triton_configs

pytestmark = pytest.mark.compiles


def chosen(arch: str, tiles_only: bool) -> tuple[set, set, list]:
    """(features of all recorded launches, features of the chosen ones, [(kernel, dtype, head dim, tile), ..] of the chosen)."""
    recorded = [(name, launch) for name, call in versions.calls(arch) for launch in versions.record(call, arch)]
    few = [launch for _, launch in versions.covering(recorded, tiles_only)]
    every, seen = (set().union(*map(versions.features, launches)) for launches in ([x for _, x in recorded], few))
    facts = []
    for launch in few:
        found = versions.choices(launch)
        tile = tuple(found.get(name) for name in ("BLOCK_M", "BLOCK_N")) + (launch.num_warps, launch.num_stages)
        facts.append((launch.name, versions.first_pointer(launch).dtype.itemsize, found.get("HEAD.dim"), tile))
    return every, seen, facts


@pytest.mark.parametrize("arch", versions.ARCHITECTURES)
def test_every_configuration_is_compiled_with_the_largest_head_that_it_serves(arch):
    every, seen, facts = run_compiled(chosen, arch, arch in versions.TILES_ONLY)
    assert {name for name, *_ in facts} == KERNELS
    assert len(facts) < 100
    missing = every - seen
    assert not missing if arch not in versions.TILES_ONLY else not any(feature[1] == "tile" for feature in missing)
    names = {"forward": "attention_forward_kernel", "inline": "attention_forward_kernel"}
    for itemsize, tables in ((2, triton_configs.TABLE), (4, triton_configs.FLOAT32)):
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        for kernel, rows in tables.items():
            by_tile: dict = {}
            for head_dim, config in rows[triton_configs.family(arch, dtype)].items():
                by_tile[config] = max(head_dim, by_tile.get(config, 0))
            for config, head_dim in by_tile.items():
                wanted = (names.get(kernel, f"{kernel}_kernel"), itemsize, head_dim, config[:4])
                assert wanted in facts, wanted


def test_what_does_not_fit_fails_the_run(monkeypatch, capsys, tmp_path):
    """Two versions, of which one has a kernel that is too large and a warning, and one dies."""
    row = dict(triton="3.6.0", arch="sm_80", kernel="plan_kernel", call="a call", dtype="float32", local=8)
    too_large = row | dict(kernel="rotate_kernel", error="needs 164.0 KiB of shared memory, sm_80 has 163")

    def process(command, env, **_):
        if "3.6.0" in env["PYTHONPATH"]:
            lines = "\n".join(map(json.dumps, (row, too_large)))
            return subprocess.CompletedProcess(command, 0, lines, "a.py:1: UserWarning: fp fusion\n")
        return subprocess.CompletedProcess(command, -9, "", "killed")

    monkeypatch.setattr(versions, "install", lambda *_: None)
    monkeypatch.setattr(versions.subprocess, "run", process)
    arguments = ["triton_versions", "--triton", "3.6.0", "3.9.0", "--arch", "sm_80", "--out", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(versions.sys, "argv", arguments)
    assert versions.main() == 1
    printed = capsys.readouterr().out
    assert "triton 3.6.0: 2 kernels, 2 failures" in printed and "triton 3.9.0: 0 kernels, 1 failures" in printed
    assert "FAILED triton 3.6.0 sm_80 rotate_kernel float32 (a call): needs 164.0 KiB" in printed
    assert "UserWarning: fp fusion" in printed and "the process ended with -9: killed" in printed
    assert "| sm_80 | plan_kernel | float32 | a call | 8 |" in printed
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


def two_rows(arch: str) -> tuple[dict, dict]:
    def call():
        sinkhorn(torch.zeros(2, 40, 64), epsilon=0.1, num_iters=1, backend="triton")

    launch = versions.record(call, arch)[0]
    fits = versions.compile_row("a call", launch, arch)
    versions.CHIPS[arch] = dataclasses.replace(versions.CHIPS[arch], shared_per_block=0)
    return fits, versions.compile_row("a call", launch, arch)


def test_a_row_says_what_a_kernel_needs():
    fits, too_large = run_compiled(two_rows, "sm_120")
    assert "error" not in fits and fits["registers"] > 16 and fits["local"] == 0 and fits["dtype"] == "float32"
    assert too_large["error"].startswith("needs ") and too_large["error"].endswith("KiB of shared memory, sm_120 has 0")
