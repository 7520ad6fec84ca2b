"""Tests of what a GPU does, all marked `gpu`: `pytest -m gpu` and the checks of benchmarks.gpu_session run them. Without a GPU
they run on the CPU with its kernels, so that they are themselves tested."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
