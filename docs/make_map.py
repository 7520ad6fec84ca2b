"""Writes the map of CONTRIBUTING.md, one line per file: the first sentence of each. `python docs/make_map.py`"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
FOLDERS = ("comp", "comp_kernels", "csrc", "benchmarks", "tests/helpers")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")
BEGIN, END = "<!-- map: written by docs/make_map.py -->\n", "<!-- end of map -->\n"


def with_map(text: str) -> str:
    """CONTRIBUTING.md with the map of today's files."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    shown = "\n".join(line.rstrip() for folder in FOLDERS for line in lines(REPOSITORY / folder))
    return f"{before}{BEGIN}\n```text\n{shown}\n```\n\n{END}{after}"


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """The folder, its files, its folders; a package is described by its __init__.py."""
    indent = "  " * depth
    name = folder.relative_to(REPOSITORY).as_posix() if depth == 0 else folder.name
    package = folder / "__init__.py"
    yield f"{indent}{name}/".ljust(34) + (first_sentence(package) if package.exists() else "")
    for path in sorted(folder.iterdir()):
        if path.suffix in SOURCES and not path.name.startswith("__"):
            yield f"{indent}  {path.name}".ljust(34) + first_sentence(path)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and any(source.suffix in SOURCES for source in path.rglob("*")):
            yield from lines(path, depth + 1)


def first_sentence(path: Path) -> str:
    """What a file says of itself first."""
    text = path.read_text()
    if path.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    else:
        said = " ".join(line.removeprefix("//").strip() for line in re.match(r"(//.*\n)*", text)[0].splitlines())
    return re.split(r"(?<=[^.A-Z])\. |\.?$", " ".join(said.split()), maxsplit=1)[0]


if __name__ == "__main__":
    CONTRIBUTING.write_text(with_map(CONTRIBUTING.read_text()))
