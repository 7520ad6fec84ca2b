"""benchmarks/gpu_session, as far as it goes without a GPU: a dry run of every part, a part that hangs, the page."""

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn.attention import varlen
from torchvision_stub import import_timm

from benchmarks import integrations
from benchmarks.gpu_session import __main__ as command
from benchmarks.gpu_session import page, parts, peers, towers
from benchmarks.gpu_session.session import SWITCHES, Session
from comp_kernels import _native


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


CHECKS = ("check_attention", "check_sinkhorn", "check_alignment")
IN_THIS_PROCESS = [name for name in parts.PARTS if name not in CHECKS]  # pytest does not run within pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_dry_run_of_a_part(name, tmp_path, monkeypatch):
    """All of its code, on small sizes; only what the CPU lacks may fail."""
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", ""))  # put back afterwards
    monkeypatch.setattr(varlen, "_should_use_cudnn", varlen._should_use_cudnn)
    with torch.compiler.set_stance("force_eager"):
        parts.run_part(Session(tmp_path, name, True, None))
    found = rows(tmp_path)
    lacking = ("torch varlen, cuDNN", "torch varlen, flash", "flex", "flash-attention", "naflexvit")
    failed = [row["failed"] for row in found if "failed" in row and row["failed"] not in peers.PEERS]  # not installed
    assert all(what.endswith(lacking) for what in failed)
    results = [row for row in found if "failed" not in row]
    assert results and "error" not in results
    what_it_says = {
        "build": lambda: results[0]["of_these_sources"],
        "attention": lambda: len(results) == 2 and results[0]["us"].keys() == results[0]["teraflops"].keys(),
        "peers": lambda: all({"ours (cpu), forward", "SDPA, cuDNN first, both"} <= row["us"].keys() for row in results),
        "sinkhorn": lambda: [row["shape"] for row in results] == [[4, 33], [5, 4, 4]],
        "alignment": lambda: len(results) == 5,
        "towers": lambda: len(results) >= 5,
        "train": lambda: results[0]["steps"] == 6 and 0 < results[0]["attention_share"] < 1,
        "fsdp": lambda: results[0]["dtensors"] > 0,
        "sanitizer": lambda: [row["passed"] for row in results] == [1, 1],
    }
    assert what_it_says.get(name, lambda: True)()


def test_every_kernel_that_is_off_is_timed_with_its_switch(tmp_path, monkeypatch):
    """Each name sets what it needs and nothing that a name before it has set; an older library has none."""
    session, now = Session(tmp_path, "attention", True, None), {}
    library = SimpleNamespace()
    for switch in ("short", "persistent", "dependent", "values_in_place"):
        setattr(library, f"comp_kernels_cuda_rope_attention_set_{switch}", partial(now.__setitem__, switch))
    session.libraries = dict.fromkeys(SWITCHES, library) | {"baseline": SimpleNamespace()}
    monkeypatch.setattr(_native, "_cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    found = {name: session.with_library(name, now.copy)() for name in SWITCHES}
    session.with_library("baseline", now.copy)()
    assert _native._cuda() is session.libraries["baseline"]
    on = {name: {switch: value for switch, value in values.items() if value} for name, values in found.items()}
    assert on == SWITCHES | {"ours, persistent": {"persistent": 132}}


@pytest.mark.slow
def test_dry_run_of_the_checks(tmp_path):
    """By the command: each in a process, a row per test function, the page at the end."""
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--dry-run", "--out", str(tmp_path), "--parts", ",".join(CHECKS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = rows(tmp_path)
    assert [row["finished"] for row in found if "finished" in row] == list(CHECKS)
    tests = [row for row in found if "test" in row]
    assert {row["part"] for row in tests} == set(CHECKS)
    assert all(row["passed"] and not row["failed"] for row in tests)
    text = (tmp_path / "report.md").read_text()
    assert all(f"## {part}\n" in text for part in CHECKS)


def test_a_check_that_fails_is_a_row(tmp_path):
    """With what it said, beside the counts of its function."""
    tests = "import pytest\n@pytest.mark.parametrize('x', (1, 2, 3))\ndef test_it(x):\n    assert x != 2\n"
    (tmp_path / "test_one.py").write_text(tests)
    script = f"""
from pathlib import Path
import pytest
from benchmarks.gpu_session import checks
from benchmarks.gpu_session.session import Session
session = Session(Path({str(tmp_path)!r}), "check_attention", True, None)
pytest.main([{str(tmp_path / "test_one.py")!r}, "-p", "no:cacheprovider"], plugins=[checks.Recorder(session)])
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    failure, counts = rows(tmp_path)
    assert failure["failed"] == "test_it[2]" and "assert 2 != 2" in failure["error"]
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 1, 0)


def test_a_tower_of_timm(tmp_path):
    import_timm()
    session = Session(tmp_path, "towers", True, None)
    with mock.patch.multiple(integrations, **towers.TINY):
        towers.measure(session, "naflexvit", 1)
    (row,) = rows(tmp_path)
    assert row["images_per_s"].keys() == {f"{v}, {p}" for v in ("patched", "unpatched, sdpa") for p in ("forward", "training")}
    patched, plain = (row["difference"][f"{variant}, forward"] for variant in ("patched", "unpatched, sdpa"))
    assert plain == 0 and 0 < patched < 1e-5  # of float32, in which a dry run computes, from float32


def test_a_failing_part_does_not_stop_the_next(tmp_path, monkeypatch):
    """A part that hangs is ended at its limit, and counts as failed."""
    monkeypatch.setitem(parts.PARTS, "host", parts.PARTS["host"]._replace(limit=0.01))
    assert parts.run_parts(["host", "sinkhorn"], Session(tmp_path, "session", True, None), minutes=9) == 1
    assert [row.get("status") for row in rows(tmp_path) if "finished" in row] == ["out of time", 0]


def test_parts_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    """One that needs more than is left gives way to those after it that fit."""
    ran = []

    def run(command, timeout, env):
        ran.append(command[command.index("--part") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(parts.subprocess, "run", run)
    session = Session(tmp_path, "session", True, None)
    session.tiny = False
    monkeypatch.setitem(parts.PARTS, "peers", parts.PARTS["peers"]._replace(estimate=61))
    monkeypatch.setitem(parts.PARTS, "host", parts.PARTS["host"]._replace(estimate=50))
    assert parts.run_parts(["peers", "host"], session, minutes=1) == 1
    assert ran == ["host"]
    assert [row["status"] for row in rows(tmp_path)] == ["left out: 60 s are left, about 61 are needed", 0]


def test_the_parts_that_ten_minutes_hold():
    """By their estimates: all but the last three, for which time is left where others are quicker."""
    names = list(parts.PARTS)
    assert names[-3:] == ["kernels", "sanitizer", "flex"]
    assert sum(parts.PARTS[name].estimate for name in names[:-3]) <= 600
    assert all(part.estimate < part.limit for part in parts.PARTS.values())


def test_page_of_a_killed_run(tmp_path):
    """Tables of what there is, one per kind of row, names within a row as rows, failures as a list."""
    said = Session(tmp_path, "attention", True, None).say
    said(workload="one", us={"a": 10.0, "b": None}, teraflops={"a": 3, "b": None})
    said(workload="two", us={"a": 12345.6}, teraflops={"a": 1})
    said(failed="three", error="no")
    said(kernel="x|y", count=3)
    text = page.write_page(tmp_path).read_text()
    for line in (
        "| workload | name | us | teraflops |",
        "| one | a | 10 | 3 |",
        "| one | b |  |  |",
        "| two | a | 12346 | 1 |",
        "- failed: three, error: no",
        "| x\\|y | 3 |",
    ):
        assert line in text.splitlines()
    assert (tmp_path / "attention.png").stat().st_size > 0


def test_refuses_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_session"])
    with pytest.raises(SystemExit, match="--dry-run"):
        command.main()
