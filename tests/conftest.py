"""Settings for the whole suite: one torch thread per xdist worker, fixed seeds, no network."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # Triton kernels run in its interpreter here; tests/emulation.py has a process that compiles
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz",
        type=int,
        default=0,
        metavar="N",
        help="every fuzz test tries N examples, drawn anew; default: a fixed few hundred",
    )


def pytest_configure(config):
    if config.getoption("--fuzz"):  # read by tests/fuzzing.py, in xdist's workers too
        os.environ["FUZZ_EXAMPLES"] = str(config.getoption("--fuzz"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
