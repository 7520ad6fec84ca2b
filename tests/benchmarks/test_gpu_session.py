"""benchmarks/gpu_session.py, as far as it goes without a GPU: the dry run of all parts, and a part that fails."""

import argparse
import json
import subprocess
import sys

from benchmarks import gpu_session


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_dry_run_of_every_part(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--dry-run", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = rows(tmp_path)
    assert [row["finished"] for row in found if "finished" in row] == list(gpu_session.PARTS)
    assert not [row for row in found if "failed" in row and row["part"] != "peers"]  # some of them have no CPU kernels
    assert [row["passed"] for row in found if "passed" in row] == [2, 2]  # both dtypes
    assert all(row["equal_bits"] for row in found if "equal_bits" in row)
    assert {row["candidate"] for row in found if "candidate" in row} >= {"ours (cpu)", "SDPA per image"}


def test_a_failing_part_does_not_stop_the_next(tmp_path, monkeypatch):
    """A part that hangs is ended at its limit; one that cannot be started counts as failed."""
    monkeypatch.setitem(gpu_session.SECONDS, "host", 0.01)
    session = gpu_session.Session(tmp_path, "session", True, None)
    arguments = argparse.Namespace(minutes=1, parts="host,sinkhorn", out=tmp_path, dry_run=True, baseline=None)
    assert gpu_session.run_parts(arguments, session) == 1
    assert [row.get("status") for row in rows(tmp_path) if "finished" in row] == ["out of time", 0]
