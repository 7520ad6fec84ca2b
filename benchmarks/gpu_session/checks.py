"""Whether the operators are right on this device: the tests marked `gpu` (tests/gpu), an operator at a time.

A process that an illegal access has ended tells nothing more, so every operator has a process, and the results of a test
function are written when it is through.
"""

from __future__ import annotations

import pytest

from .session import ROOT, Session

TINY = "equal_bits or case_dim_72 or (against_float64 and small) or through_the_iterations"  # of the dry run, with -k


def rope_attention(session: Session) -> None:
    run(session, "test_gpu_rope_attention.py")


def sinkhorn(session: Session) -> None:
    run(session, "test_gpu_sinkhorn.py")


def alignment_loss(session: Session) -> None:
    run(session, "test_gpu_alignment_loss.py")


def run(session: Session, file: str) -> None:
    """One file of tests/gpu; ends the process with pytest's exit code unless all pass."""
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-m", "gpu", *(["-k", TINY] if session.tiny else [])]
    code = pytest.main([str(ROOT / "tests" / "gpu" / file), *options], plugins=[Recorder(session)])
    if code != 0:
        raise SystemExit(int(code))


class Recorder:
    """Says what failed as it happens, and how many passed of every test function."""

    def __init__(self, session: Session):
        self.session, self.test, self.counts, self.seconds = session, None, {}, 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.split("::")[-1].split("[")[0]
        if test != self.test:
            self.flush()
            self.test, self.counts, self.seconds = test, dict(passed=0, failed=0, skipped=0), 0.0
        self.seconds += report.duration
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            reason = getattr(report.longrepr, "reprcrash", None)
            self.session.say(
                failed=report.nodeid.split("::")[-1], error=str(reason.message if reason else report.longrepr)[:300]
            )

    def pytest_sessionfinish(self) -> None:
        self.flush()

    def flush(self) -> None:
        if self.test is not None:
            self.session.say(test=self.test, **self.counts, seconds=round(self.seconds, 1))
