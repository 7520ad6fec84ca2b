"""Packages out of registries, at the versions of manifest.json, through their ordinary clients (pip, npm, apt-get).

An archive whose SHA-256 differs from the manifest is refused. Nothing is installed: packages are unpacked below a folder.
"""

from __future__ import annotations

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

Places = dict[str, Path]
"""Folder of each unpacked package, by the package's name."""


class FetchError(RuntimeError):
    """A package that cannot be had, or is not the one of the manifest."""


@dataclass(frozen=True)
class Package:
    """One line of the manifest."""

    uses: list[str]
    """Parts that are built from it."""
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
    return [Package(**entry) for entry in json.loads(Path(__file__).with_name("manifest.json").read_text())]


def fetch_packages(part: str, folder: Path) -> Places:
    """Download and unpack below `folder` what `part` is built from: {package: folder}. Done once; FetchError where it fails."""
    folder = folder.resolve()  # clients run in folders of their own
    archives, unpacked = folder / "archives", folder / "packages"
    for place in (archives, unpacked):
        place.mkdir(parents=True, exist_ok=True)
    wanted = [package for package in manifest() if part in package.uses]
    return {package.package: unpack(download(package, archives), unpacked) for package in wanted}


def download(package: Package, folder: Path) -> Path:
    """The archive below `folder`, checked; downloaded when it is not there yet."""
    place = folder / package.package.replace("/", "+")
    archives = sorted(place.glob("*")) if place.is_dir() else []
    if not archives:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _run(package.command(), Path(scratch))
            archives = [Path(shutil.move(path, place)) for path in Path(scratch).iterdir()]
    if len(archives) != 1:
        raise FetchError(f"{place} should hold one archive, found {len(archives)}; remove the folder and try again")
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise FetchError(f"{archives[0]} has SHA-256 {found}, manifest.json says {package.sha256}")
    return archives[0]


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
