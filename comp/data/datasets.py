"""Datasets: anything with a length whose items are `Sample`s; here files of LLaVA records, and datasets named by a callable."""

from __future__ import annotations

import importlib
import inspect
import json
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config import ConfigError
from ..files import is_lfs_pointer
from .batch import BadSampleError, Sample, printable
from .records import sample_from_record

_BLANKS, _DECODER = re.compile(r"[ \t\n\r]*"), json.JSONDecoder()


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
        if is_lfs_pointer(self.path):
            raise ConfigError(f"data.path {self.path} is a pointer of git-lfs, not the file itself; `git lfs pull` fetches it")
        self._records = _Records(self.path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        place = f"{self.path.name}[{index}]"
        try:
            record = json.loads(self._records[index], object_pairs_hook=_each_field_once)
        except (ValueError, RecursionError) as error:
            raise BadSampleError(f"{place}: not valid JSON ({error})") from error
        try:
            return sample_from_record(record, place, self.images, images_anywhere=self.images_anywhere)
        except RecursionError as error:
            raise BadSampleError(f"{place}: brackets within brackets, too deep to be read ({error})") from error


def _each_field_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of equal names; the others would be lost without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"twice the field {printable(next(name for name in names if names.count(name) > 1))!r}")
    return fields


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

    def __reduce__(self) -> tuple[type[_Records], tuple[Path]]:
        return _Records, (self._path,)  # a memory map cannot be pickled: a spawned worker reads the file again


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
    content = path.read_bytes()
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        return _join(element.encode("utf-8", "surrogatepass") for element in _elements(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.path {path} must hold a JSON list: {error}") from error


def _elements(text: str) -> Iterator[str]:
    """The texts of the elements of a JSON list, as they stand there."""
    begin, end = _after_blanks(text, 0), len(text.rstrip(" \t\n\r"))
    if text[begin : begin + 1] != "[":
        raise json.JSONDecodeError("Expecting '['", text, begin)
    place, closed = _after_blanks(text, begin + 1), False
    if text[place : place + 1] == "]":
        place, closed = place + 1, True
    while not closed:
        _, after = _DECODER.raw_decode(text, place)
        yield text[place:after]
        place = _after_blanks(text, after)
        if text[place : place + 1] not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        closed = text[place] == "]"
        place = place + 1 if closed else _after_blanks(text, place + 1)
    if place != end:
        raise json.JSONDecodeError("Extra data", text, place)


def _after_blanks(text: str, place: int) -> int:
    found = _BLANKS.match(text, place)
    assert found is not None  # none at all are a match too
    return found.end()


def _join(texts: Iterable[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    data, spans = bytearray(), []
    for text in texts:
        spans.append((len(data), len(data) + len(text)))
        data += text
    return bytes(data), spans
