"""Settings for the whole suite: one torch thread per xdist worker, fixed seeds, no network."""

import logging
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter here; helpers/emulation.py has a process that compiles.
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
    if config.getoption("--fuzz"):  # read by helpers/fuzzing.py, in xdist's workers too
        os.environ["FUZZ_EXAMPLES"] = str(config.getoption("--fuzz"))


def pytest_collection_modifyitems(items):
    """What compiles GPU code is slow, and what is emulated was compiled before."""
    for item in items:
        if item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.compiles)
        if item.get_closest_marker("compiles"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class _Deprecations(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if "deprecated" in record.getMessage():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def _logged_deprecations():
    """transformers logs most of its deprecations, once per process, where others warn: they end a test as well."""
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages, handler.messages
