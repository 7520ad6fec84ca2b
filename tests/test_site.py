"""The reference pages of the site name every public thing, and name nothing that is not there."""

import importlib
import inspect
import re
from pathlib import Path

import comp
import comp_kernels
import comp_kernels.integrations

PAGES = Path(__file__).parent.parent / "docs" / "reference"
NAMED = [name for page in PAGES.glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)]


def found(path):
    """The module, class or function at a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def test_every_public_name_is_there():
    public = {*comp.__all__, *comp_kernels.__all__, *comp_kernels.integrations.__all__} - {"layers", "reference"}
    assert public <= {name.rpartition(".")[2] for name in NAMED}


def test_every_name_is_that_of_something_described():
    for path in NAMED:
        if path != "comp.eval.lmms_adapter.CoMPForLmmsEval":  # imports lmms-eval
            assert inspect.getdoc(found(path)), path
