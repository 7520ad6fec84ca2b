"""benchmarks/gpu_session, as far as it goes without a GPU: the dry run of all parts, a part that hangs, the page."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu_session import __main__ as command
from benchmarks.gpu_session import page, parts
from benchmarks.gpu_session.session import Session


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_dry_run_of_every_part(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--dry-run", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = rows(tmp_path)
    assert [row["finished"] for row in found if "finished" in row] == list(parts.PARTS)
    assert not [row for row in found if "failed" in row and row["part"] != "peers"]  # some of them have no CPU kernels
    assert [row["passed"] for row in found if "passed" in row] == [2, 2]  # both dtypes
    assert all(row["equal_bits"] for row in found if "equal_bits" in row)
    assert {row["candidate"] for row in found if "candidate" in row} >= {"ours (cpu)", "SDPA per image"}
    text = (tmp_path / "report.md").read_text()
    assert all(f"## {part}\n" in text for part in parts.PARTS)
    assert "![sinkhorn](sinkhorn.png)" in text and (tmp_path / "sinkhorn.png").stat().st_size > 0


def test_a_failing_part_does_not_stop_the_next(tmp_path, monkeypatch):
    """A part that hangs is ended at its limit, and counts as failed."""
    monkeypatch.setitem(parts.PARTS, "host", parts.PARTS["host"]._replace(limit=0.01))
    assert parts.run_parts(["host", "sinkhorn"], Session(tmp_path, "session", True, None), minutes=1) == 1
    assert [row.get("status") for row in rows(tmp_path) if "finished" in row] == ["out of time", 0]


def test_parts_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    """One that needs more than is left gives way to those after it that fit."""
    ran = []

    def run(command, timeout):
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


def test_all_parts_fit_into_ten_minutes():
    assert sum(part.estimate for part in parts.PARTS.values()) <= 600
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
