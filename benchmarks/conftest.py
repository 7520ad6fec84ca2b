"""The option --heavy: cases that need minutes or gigabytes."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--heavy", action="store_true", help="run the benchmark cases that need minutes or several GiB")


def pytest_configure(config):
    config.addinivalue_line("markers", "heavy: needs minutes or several GiB; run with --heavy")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--heavy"):
        for item in items:
            if item.get_closest_marker("heavy"):
                item.add_marker(pytest.mark.skip(reason="needs minutes or several GiB: run with --heavy"))
