"""Files that a crash leaves either old or new, never torn; how to tell that one has changed since, or that it never came."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a crash leaves either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sync_folder(folder: Path) -> None:
    """Once this returns, what was created, renamed or removed in `folder` survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path, num_bytes: int | None = None) -> int:
    """CRC-32 of a file's content, or of its beginning: against damage, not against intent. Gigabytes per second where memory
    holds the file."""
    left = path.stat().st_size if num_bytes is None else num_bytes
    value, buffer = 0, memoryview(bytearray(2**22))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer[:left]):
            value = zlib.crc32(buffer[:count], value)
            left -= count
    return value


def is_lfs_pointer(path: Path) -> bool:
    """Whether a clone without git-lfs left three lines of text in the place of a file."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
