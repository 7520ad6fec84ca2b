"""The map of CONTRIBUTING.md is that of today's files, and every file says in one sentence what it is."""

import runpy
from pathlib import Path

make_map = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "make_map.py"))


def test_map_is_current():
    text = make_map["CONTRIBUTING"].read_text()
    assert make_map["with_map"](text) == text, "run: python docs/make_map.py"


def test_every_file_says_what_it_is():
    for folder in make_map["FOLDERS"]:
        for path in (make_map["REPOSITORY"] / folder).rglob("*"):
            if make_map["is_source"](path) and path.name != "__main__.py":
                assert make_map["first_sentence"](path), path
