"""Datasets: anything with a length whose items are `Sample`s; here the LLaVA JSON format, and datasets named by a callable.

    {"id": "...", "image": "a.png" or ["a.png", "b.png"] or absent,
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

A record with "images", "video" or "videos" is refused by name: its pictures would be missed.
Optional fields for evaluation: "answers" (list of accepted answers), "question_type", "metric", "options" (texts of A, B, ...).
"""

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
from .batch import Message, Sample

IMAGE_MARKER = "<image>"
_PICTURES_ELSEWHERE = ("images", "video", "videos")  # fields of other formats; ignored, they would train blind
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadSampleError(ValueError):
    """Samples that cannot be used; the message starts with a name. Training skips and counts them, or stops, by policy."""


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

    def __init__(self, path: str | Path, images: str | Path | None = None):
        self.path = Path(path)
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
        return sample_from_record(record, place, self.images)


def sample_from_record(record: Any, place: str, images: Path) -> Sample:
    """A `Sample` from one LLaVA record. Images stand in front of the turn that marks them; without marks, of the first turn."""
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadSampleError(f'{place}: needs an object with a list "conversations", got {str(record)[:80]}')
    name = f"{place} {record['id']}" if "id" in record else place
    for field in _PICTURES_ELSEWHERE:
        if record.get(field):
            raise BadSampleError(
                f'{name}: pictures belong in "image" (a text or a list), got "{field}": {str(record[field])[:80]}'
            )
    paths = record.get("image") or []
    paths = [paths] if isinstance(paths, str) else paths
    answers, options = record.get("answers") or [], record.get("options") or []
    for field, texts in (("image", paths), ("answers", answers), ("options", options)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadSampleError(f'{name}: "{field}" must be a list of texts, got {str(record[field])[:80]}')
        for text in texts:
            _check_characters(text, field, name)
    for field in ("question_type", "metric"):
        if not isinstance(record.get(field), str | None):
            raise BadSampleError(f'{name}: "{field}" must be a text or absent, got {str(record[field])[:80]}')
    waiting = [str(images / path) for path in paths]
    num_images = len(waiting)
    messages = []
    for turn in record["conversations"]:
        role, text = _role_and_text(turn, name)
        num_markers = text.count(IMAGE_MARKER)
        if num_markers > len(waiting):
            raise BadSampleError(f"{name}: more {IMAGE_MARKER} markers than its {num_images} images")
        messages.append(Message(role=role, text=text.replace(IMAGE_MARKER, "").strip(), images=waiting[:num_markers]))
        waiting = waiting[num_markers:]
    _check_turns(messages, name)
    if waiting and len(waiting) < num_images:  # which picture a marker means can only be guessed
        raise BadSampleError(
            f"{name}: fewer {IMAGE_MARKER} markers than its {num_images} images; mark all of them, or none to show them first"
        )
    first_user = next(m for m in messages if m.role == "user")
    first_user.images = waiting + first_user.images
    return Sample(
        name=name,
        messages=messages,
        answers=answers,
        question_type=record.get("question_type") or "all",
        metric=record.get("metric"),
        options=options,
    )


def _role_and_text(turn: Any, name: str) -> tuple[str, str]:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(turn.get("value"), str):
        raise BadSampleError(f'{name}: a turn needs "from" ({", ".join(_ROLES)}) and a text "value", got {str(turn)[:80]}')
    _check_characters(turn["value"], "value", name)
    return _ROLES[speaker], turn["value"]


def _check_characters(text: str, field: str, name: str) -> None:
    """JSON may hold halves of characters (surrogates), which no tokenizer and no file name takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f'{name}: "{field}" holds half a character at position {error.start}: {text!r:.80}') from error


def _check_turns(messages: list[Message], name: str) -> None:
    roles = [m.role for m in messages]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        raise BadSampleError(f"{name}: turns must alternate user, assistant and end with the assistant, got {roles}")
    if any(m.images for m in messages if m.role != "user"):
        raise BadSampleError(f"{name}: {IMAGE_MARKER} is only allowed in user turns")
    if not any(m.text for m in messages if m.role == "assistant"):
        raise BadSampleError(f"{name}: every answer is empty")


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
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"data.path {path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise ConfigError(f"data.path {path} must hold a JSON list, got {type(records).__name__}")
    return _join(json.dumps(record).encode() for record in records)


def _join(texts: Iterable[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    data, spans = bytearray(), []
    for text in texts:
        spans.append((len(data), len(data) + len(text)))
        data += text
    return bytes(data), spans
