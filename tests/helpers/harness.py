"""The public evaluation harness, whose rules ours are compared with."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

HARNESS = "0.7.3"


def harness_folder() -> Path:
    """Where lmms_eval is installed, found without an import; skips the test where it is not, or where its rules are others."""
    try:
        installed = version("lmms-eval")
    except PackageNotFoundError:
        pytest.skip(f"lmms-eval is not installed: pip install --no-deps lmms-eval=={HARNESS} loguru pytz")
    if installed != HARNESS:
        pytest.skip(f"compared with the rules of lmms-eval {HARNESS}, {installed} is installed")
    return Path(find_spec("lmms_eval").origin).parent
