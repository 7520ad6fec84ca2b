"""The lines before the first step: how old the process is, what was done, what Triton compiled."""

import re
import subprocess
import sys
import time

import pytest
import torch

from comp.train.startup import Startup, process_age


@pytest.mark.slow
def test_age_counts_from_the_start_of_the_process():
    began = time.monotonic()
    code = "import time; time.sleep(0.3); from comp.train.startup import process_age; print(process_age())"
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= age <= time.monotonic() - began + 0.1
    assert process_age() > age  # imports of this one included


def test_first_step_is_said_once(capsys):
    startup = Startup(torch.device("cpu"), enabled=True)
    startup.say("data opened")
    with startup.compilations_said():  # on a CPU nothing compiles
        startup.step_done()
        startup.step_done()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\[ *\d+\.\d s\] ", "", line) for line in lines] == ["data opened", "first step done"]


def test_compilations_are_said(capsys):
    startup = Startup(torch.device("cuda"), enabled=True)
    startup.compiled("rotate_kernel", "sm_90", 0.21, False)
    startup.compiled("plan_kernel", "sm_90", 0.0, True)  # was in the cache
    startup.compiled("row_terms_kernel", "sm_90", 1.04, False)
    first, second = capsys.readouterr().err.splitlines()
    assert "Triton compiled rotate_kernel for sm_90 in 0.2 s; kept for later runs" in first and "comp.warm_up" in first
    assert second.endswith("Triton compiled row_terms_kernel for sm_90 in 1.0 s")


def test_other_processes_are_silent(capsys):
    startup = Startup(torch.device("cuda"), enabled=False)
    with startup.compilations_said():
        startup.compiled("rotate_kernel", "sm_90", 0.2, False)
        startup.step_done()
    assert capsys.readouterr().err == ""
