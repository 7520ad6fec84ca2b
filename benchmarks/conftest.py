"""The option --heavy: cases that need minutes or gigabytes. What a case has measured is shown as soon as it has."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--heavy", action="store_true", help="run the benchmark cases that need minutes or several GiB")


def pytest_configure(config):
    config.addinivalue_line("markers", "heavy: needs minutes or several GiB; run with --heavy")
    config.pluginmanager.register(MeasuredLines(config))


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--heavy"):
        for item in items:
            if item.get_closest_marker("heavy"):
                item.add_marker(pytest.mark.skip(reason="needs minutes or several GiB: run with --heavy"))


class MeasuredLines:
    """Without -s pytest keeps what passing tests print, and the suite would be silent for minutes."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed and report.capstdout.strip():
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write(f"\n{report.capstdout.strip()}\n")
