"""Writes the map of CONTRIBUTING.md, one line per file: the first sentence of each. `python docs/make_map.py`"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
FILES = ("train.py", "setup.py")
FOLDERS = ("comp", "comp_kernels", "csrc", "benchmarks", "tests/helpers", "docs", ".ci")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")
BEGIN, END = "<!-- map: written by docs/make_map.py -->\n", "<!-- end of map -->\n"


def with_map(text: str) -> str:
    """CONTRIBUTING.md with the map of today's files."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    shown = [name.ljust(34) + first_sentence(REPOSITORY / name) for name in FILES]
    shown += [line.rstrip() for folder in FOLDERS for line in lines(REPOSITORY / folder)]
    return f"{before}{BEGIN}\n```text\n{chr(10).join(shown)}\n```\n\n{END}{after}"


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """The folder, its files, its folders; a package is described by its __init__.py."""
    indent = "  " * depth
    name = folder.relative_to(REPOSITORY).as_posix() if depth == 0 else folder.name
    package = folder / "__init__.py"
    yield f"{indent}{name}/".ljust(34) + (first_sentence(package) if package.exists() else "")
    for path in sorted(folder.iterdir()):
        if is_source(path) and not path.name.startswith("__"):
            yield f"{indent}  {path.name}".ljust(34) + first_sentence(path)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and any(is_source(inner) for inner in path.rglob("*")):
            yield from lines(path, depth + 1)


def is_source(path: Path) -> bool:
    """Programs of .ci have no suffix."""
    return path.suffix in SOURCES or path.parent == REPOSITORY / ".ci"


def first_sentence(path: Path) -> str:
    """What a file says of itself first; the full stop of an abbreviation (Eq. 7) ends no sentence."""
    text = path.read_text()
    if path.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    else:
        comment = re.match(r"(?:#!.*\n)?((?:(?://|#(?!pragma|include)).*\n)*)", text)[1]
        said = "\n".join(line.lstrip("/#").strip() for line in comment.splitlines()).split("\n\n")[0]
    return re.split(r"(?<=[^.A-Z])(?<!Eq)(?<!Eqs)\. |[.:]?$", " ".join(said.split()), maxsplit=1)[0]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    CONTRIBUTING.write_text(with_map(CONTRIBUTING.read_text()))
