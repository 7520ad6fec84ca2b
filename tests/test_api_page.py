"""docs/api.md: current, complete, and docstrings in the project's manner come out as meant."""

import importlib.util
from pathlib import Path

import comp
import comp_kernels
import comp_kernels.integrations

REPOSITORY = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("make_api", REPOSITORY / "docs" / "make_api.py")
make_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_api)

DOCSTRING = """First sentence
over two lines with <tags> and 2 * 3.

    y = x * 2

Args:
    x:  a number.
    mode, kind:  how:
        "fast"  quickly
            and badly
        "slow"  well

x:  listed without a heading,
    continued
note: this is no parameter.

Raises:
    ValueError: always."""

MARKDOWN = """First sentence over two lines with &lt;tags> and 2 \\* 3.

```text
y = x * 2
```

**Args:**

- **x**: a number.
- **mode, kind**: how:
  - `"fast"`: quickly and badly
  - `"slow"`: well

- **x**: listed without a heading, continued

note: this is no parameter.

**Raises:**

- **ValueError**: always."""


def test_the_committed_page_is_current():
    assert make_api.PAGE.read_text() == make_api.page(), "run: python docs/make_api.py"


def test_every_public_name_is_there():
    headings = {line.removeprefix("### ") for line in make_api.page().splitlines() if line.startswith("### ")}
    public = {*comp.__all__, *comp_kernels.__all__, *comp_kernels.integrations.__all__} - {"layers", "reference"}
    assert public <= headings


def test_docstrings_become_markdown():
    assert make_api.markdown(DOCSTRING, ["x", "mode", "kind"]) == MARKDOWN
