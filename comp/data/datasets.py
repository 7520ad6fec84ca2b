"""Datasets: anything with a length whose items are `Sample`s; here files of LLaVA records, and datasets named by a callable."""

from __future__ import annotations

import importlib
import inspect
import json
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config import ConfigError
from .batch import BadSampleError, Sample
from .records import sample_from_record


class Dataset(Protocol):
    """What the trainer needs of a dataset. Items must not depend on anything but the index, so that runs repeat."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def dataset_from_factory(factory: str, arguments: dict[str, Any]) -> Dataset:
    """Call "package.module:callable" with `arguments`."""
    module_name, _, attribute = factory.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.factory {factory!r} cannot be imported: {error}") from error
    try:
        inspect.signature(function).bind(**arguments)  # apart from the call, whose own errors should stay what they are
    except TypeError as error:
        raise ConfigError(f"data.factory {factory!r} does not take the arguments {arguments}: {error}") from error
    dataset = function(**arguments)
    if not all(hasattr(dataset, method) for method in ("__len__", "__getitem__")):
        raise ConfigError(f"data.factory {factory!r} must return an object with __len__ and __getitem__, got {dataset!r:.80}")
    return dataset


class LlavaDataset:
    """Samples of one LLaVA-format .json or .jsonl file. Records stay bytes until they are read, so workers share the memory."""

    def __init__(self, path: str | Path, images: str | Path | None = None, *, images_anywhere: bool = False):
        self.path = Path(path)
        self.images_anywhere = images_anywhere
        self.images = Path(images) if images is not None else self.path.parent
        if not self.path.is_file():
            raise ConfigError(f"data.path {self.path} is not a file")
        if self.path.suffix not in (".json", ".jsonl"):
            raise ConfigError(f"data.path must end in .json or .jsonl, got {self.path}")
        self._records = _Records(self.path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        place = f"{self.path.name}[{index}]"
        try:
            record = json.loads(self._records[index])
        except (ValueError, RecursionError) as error:
            raise BadSampleError(f"{place}: not valid JSON ({error})") from error
        try:
            return sample_from_record(record, place, self.images, images_anywhere=self.images_anywhere)
        except RecursionError as error:
            raise BadSampleError(f"{place}: brackets within brackets, too deep to be read ({error})") from error


class _Records:
    """JSON texts of the elements of a file: a memory map with line starts (.jsonl) or one block of bytes (.json)."""

    def __init__(self, path: Path):
        self._path = path
        if path.suffix == ".jsonl":
            self._data, spans = _map_lines(path)
        else:
            self._data, spans = _read_list(path)
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)  # [n, 2] begin and end of each record

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._path} has {len(self)} samples, asked for {index}")
        begin, end = self._spans[index]
        return self._data[begin:end]

    def __getstate__(self) -> Path:
        return self._path  # a memory map cannot be pickled: a spawned worker reads the file again

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)


def _map_lines(path: Path) -> tuple[mmap.mmap | bytes, list[tuple[int, int]]]:
    if path.stat().st_size == 0:
        return b"", []
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        spans, begin = [], 0
        for line in file:
            if line.strip():
                spans.append((begin, begin + len(line)))
            begin += len(line)
    return data, spans


def _read_list(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    with path.open("rb") as file:
        try:
            records = json.load(file)
            if isinstance(records, list):
                return _join(json.dumps(record).encode() for record in records)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"data.path {path} is not valid JSON: {error}") from error
    raise ConfigError(f"data.path {path} must hold a JSON list, got {type(records).__name__}")


def _join(texts: Iterable[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    data, spans = bytearray(), []
    for text in texts:
        spans.append((len(data), len(data) + len(text)))
        data += text
    return bytes(data), spans
