"""Streams: rows of Hugging Face datasets, parquet files or webdataset shards, mixed by weights and resumed exactly.

Training reads `lanes` independent streams. Sample i of a step comes from lane i % lanes, so what a step holds does not depend
on how many processes and workers share the lanes. A lane is described by a small state: how many samples it gave, and for every
source where it stands. Rows are shuffled within windows of a fixed number of rows, each lane's rows of a source anew in every
epoch; what a state needs to say is where the window began.
"""

from __future__ import annotations

import copy
import glob
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError, SourceConfig
from .batch import BadSampleError, Sample
from .hf_folder import datasets_library, images_inside, lazy_image, without_decoding
from .mixture import Mixture, SampleOrder, open_sources
from .records import check_media, sample_from_record

SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
"""Suffixes of files that are read as streams, and what the library `datasets` calls their form."""
IMAGE_COLUMNS = ("image", "images", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "txt", "text")
TURN_COLUMNS = ("conversations", "messages", "texts")
ANSWER_COLUMNS = ("answers", "options", "question_type", "metric", "system")
READ = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, *TURN_COLUMNS, *ANSWER_COLUMNS, "json", "id", "__key__", "__url__"}
CAPTION_QUESTION = "Describe the image."
State = dict[str, Any]


def is_stream(source: SourceConfig) -> bool:
    return source.hub is not None or (source.path is not None and Path(source.path).suffix in SHARDS)


def open_stream(source: SourceConfig) -> Any:
    """The rows of a source as a datasets.IterableDataset, images encoded. ConfigError where there is nothing to read."""
    library = datasets_library()
    name = source.hub or source.path
    if source.sampling != "all":
        raise ConfigError(f"data.sampling of {name} must be all, got {source.sampling!r}: a stream has no size to choose from")
    try:
        if source.hub is not None:
            rows = library.load_dataset(source.hub, source.subset, split=source.split, streaming=True)
        else:
            assert source.path is not None  # SourceConfig: one of the two
            files = sorted(glob.glob(source.path))
            if not files:
                raise ConfigError(f"data.path {source.path} matches no file")
            kind = SHARDS[Path(source.path).suffix]
            rows = library.load_dataset(kind, data_files={"train": files}, split="train", streaming=True)
    except ConfigError:
        raise
    except Exception as error:  # the library raises its own, fsspec's and pyarrow's errors
        raise ConfigError(f"data source {name} cannot be read: {type(error).__name__}: {error}") from error
    if rows.features is None:
        rows = rows._resolve_features()  # reads the first row: what is an image is known only then
    return without_decoding(rows, library)


def image_folder(source: SourceConfig) -> Path:
    """Where names of image files in the rows of a stream start, and what they may not lead out of."""
    if source.images or source.hub:
        return Path(source.images or source.hub or "")
    return next(folder for folder in Path(source.path or "").parents if not glob.has_magic(str(folder)))


def sample_from_row(row: dict[str, Any], place: str, images: Path, *, images_anywhere: bool = False) -> Sample:
    """One row as a `Sample`.

    images:           folder that names of image files start from.
    images_anywhere:  they may be absolute or lead out of it.

    Images are the cells of `image`, `images`, `jpg`, `jpeg`, `png` or `webp`. What is said about them is the first of:
    `conversations` (LLaVA), `messages` (role and content), `texts` (user and assistant, as in FineVision), a LLaVA record in
    `json` (webdataset), or a caption in `caption`, `txt` or `text`. Images that a `json` names are those beside it, as many
    as it names. Raises BadSampleError for anything else, and for pictures and other media that would be missed in columns of
    other names.
    """
    named = 0
    row = {name: cell.tolist() if isinstance(cell, np.ndarray) else cell for name, cell in row.items()}
    if isinstance(row.get("json"), (dict, bytes, str)):
        record = row["json"]
        try:
            record = record if isinstance(record, dict) else json.loads(record)
        except ValueError as error:
            raise BadSampleError(f"{place}: json: not valid JSON ({error})") from error
        if isinstance(record, dict):
            named = sum(bool(cell) for column in IMAGE_COLUMNS for cell in _cells(record.get(column)))
            row = {**row, **{key: value for key, value in record.items() if key not in IMAGE_COLUMNS}}
    record = {key: row[key] for key in ANSWER_COLUMNS if row.get(key)}
    record["conversations"] = _conversation(row)
    name = row.get("id", row.get("__key__"))
    if isinstance(name, (str, int)):
        record["id"] = name
    try:
        cells = [cell for column in IMAGE_COLUMNS for cell in _cells(row.get(column))]
        pictures = [lazy_image(cell) for cell in images_inside(cells, images, anywhere=images_anywhere)]
    except (TypeError, ValueError) as error:
        raise BadSampleError(f"{place}: {error}") from error
    if named and named != len(pictures):
        raise BadSampleError(f"{place}: json names {named} images, beside it are {len(pictures)}")
    for column, cell in row.items():
        if column not in READ and cell not in (None, "", b"", [], {}):
            check_media(column, cell, bool(pictures), place)
    if not pictures and record["conversations"] is not None and not any(row.get(column) for column in TURN_COLUMNS):
        raise BadSampleError(f"{place}: a caption and no picture in {', '.join(IMAGE_COLUMNS)}; the row has {', '.join(row)}")
    return sample_from_record(record, place, Path(), pictures=pictures)


def _cells(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _conversation(row: dict[str, Any]) -> Any:
    if row.get("conversations"):
        return row["conversations"]
    if turns := row.get("messages"):
        return _each(turns, lambda turn: [_renamed(turn)])
    if pairs := row.get("texts"):
        return _each(pairs, lambda pair: [{"from": role, "value": pair.get(role)} for role in ("user", "assistant")])
    caption = next((row[column] for column in CAPTION_COLUMNS if isinstance(row.get(column), str)), None)
    if caption is None:
        return None
    return [{"from": "human", "value": CAPTION_QUESTION}, {"from": "gpt", "value": caption.strip()}]


def _each(turns: Any, read: Callable[[dict[str, Any]], list[Any]]) -> Any:
    """What a list of turns says, turn by turn; what is no turn, and no list, is left as it is, to be named."""
    if not isinstance(turns, list):
        return turns
    return [said for turn in turns for said in (read(turn) if isinstance(turn, dict) else [turn])]


def _renamed(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of `messages` as LLaVA has it, with all else that it says, such as a weight of 0."""
    others = {field: value for field, value in turn.items() if field not in ("role", "content")}
    return {**others, "from": turn.get("role"), "value": turn.get("content")}


@dataclass
class _Rows:
    """One source of one lane: an endless iterator over its samples, that can be told where it stands."""

    name: str
    read: Callable[[dict[str, Any], str], Sample]
    """`sample_from_row` with the source's settings."""
    rows: Any
    """datasets.IterableDataset of the lane's rows."""
    window: int
    seed: tuple[int, ...]
    state: State = field(default_factory=lambda: dict(epoch=0, number=0, begin=None, taken=0))
    """number: windows before this one in the epoch; begin: where the rows stood then; taken: samples given from this window."""

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        state = self.state
        while True:
            rows = copy.deepcopy(self.rows)  # a copy that shares anything would go on where another one stood
            if state["begin"] is not None:
                rows.load_state_dict(copy.deepcopy(state["begin"]))
            iterator = iter(rows)
            while window := self._window(iterator):
                order = np.random.default_rng([*self.seed, state["epoch"], state["number"]]).permutation(len(window))
                while state["taken"] < len(window):
                    index = int(order[state["taken"]])
                    state["taken"] += 1
                    yield f"{self.name}[{state['number'] * self.window + index}]", window[index]
                state.update(number=state["number"] + 1, taken=0, begin=copy.deepcopy(rows.state_dict()))
            if state["number"] == 0:
                raise ConfigError(f"data source {self.name} has no row for this lane; use fewer lanes")
            state.update(epoch=state["epoch"] + 1, number=0, taken=0, begin=None)

    def _window(self, iterator: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        window: list[dict[str, Any]] = []
        try:
            while len(window) < self.window and (row := next(iterator, None)) is not None:
                window.append(row)
        except Exception as error:  # a damaged shard ends its stream in errors of any kind
            raise ConfigError(f"data source {self.name} cannot be read on: {type(error).__name__}: {error}") from error
        return window


@dataclass
class _Items:
    """One source with indices of one lane: every `lanes`-th of a shuffled order."""

    samples: Mixture
    order: SampleOrder
    lane: int
    lanes: int
    state: State = field(default_factory=lambda: dict(taken=0))

    def __iter__(self) -> Iterator[tuple[str, int]]:
        while True:
            index = self.order[self.state["taken"] * self.lanes + self.lane]
            self.state["taken"] += 1
            yield self.samples.place(index), index


class Lane:
    """One lane of a mixture: an endless iterator over (place, sample), where a sample may be a BadSampleError.

    count:  samples it gave so far.
    """

    def __init__(self, streams: Streams, number: int, state: State | None = None):
        self._weights = streams.weights
        self._seed = (streams.seed, number)
        self._sources = [streams.source_of_lane(index, number) for index in range(len(streams.sources))]
        self.count = 0
        if state is not None:
            self.count = state["count"]
            for source, its in zip(self._sources, state["sources"]):
                source.state = copy.deepcopy(its)
        self._iterators: list[Iterator[tuple[str, Any]]] = [iter(source) for source in self._sources]

    def state(self) -> State:
        """Where the lane stands: JSON data."""
        return dict(count=self.count, sources=[copy.deepcopy(source.state) for source in self._sources])

    def __iter__(self) -> Iterator[tuple[str, Sample | BadSampleError]]:
        return self

    def __next__(self) -> tuple[str, Sample | BadSampleError]:
        rng = np.random.default_rng([*self._seed, self.count])
        chosen = int(rng.choice(len(self._weights), p=self._weights)) if len(self._weights) > 1 else 0
        self.count += 1
        place, item = next(self._iterators[chosen])
        source = self._sources[chosen]
        try:
            return place, source.samples[item] if isinstance(source, _Items) else source.read(item, place)
        except BadSampleError as error:
            return place, error


def needs_lanes(sources: Sequence[SourceConfig]) -> bool:
    """Whether a stage with these sources is read in lanes: one of them is a stream or has a weight."""
    return any(is_stream(source) or source.weight is not None for source in sources)


class Streams:
    """The sources of a stage that is read in lanes, opened; `Lane` reads them."""

    def __init__(self, sources: Sequence[SourceConfig], *, lanes: int, seed: int):
        self.sources = list(sources)
        self.lanes, self.seed = lanes, seed
        total = sum(source.weight or 1.0 for source in sources)
        self.weights = [(source.weight or 1.0) / total for source in sources]
        self._opened = [open_stream(s) if is_stream(s) else open_sources([s], seed) for s in sources]

    def sizes(self) -> list[int]:
        """Shards of each stream, and samples of each dataset: what a lane reads follows from them."""
        return [n for rows in self._opened for n in (rows.sizes() if isinstance(rows, Mixture) else [rows.num_shards])]

    def first_samples(self, count: int, lanes: range) -> Iterator[Sample]:
        """The samples among the first `count` of these lanes together that can be read."""
        for lane in (Lane(self, number) for number in lanes):
            for _, sample in itertools.islice(lane, count // len(lanes)):
                if isinstance(sample, Sample):
                    yield sample

    def source_of_lane(self, index: int, lane: int) -> _Rows | _Items:
        source, opened = self.sources[index], self._opened[index]
        if isinstance(opened, Mixture):
            return _Items(opened, SampleOrder(len(opened), self.seed + index), lane, self.lanes)
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(opened, rank=lane, world_size=self.lanes)  # its own shards, or every n-th row
        read = partial(sample_from_row, images=image_folder(source), images_anywhere=source.images_anywhere)
        return _Rows(f"{source.hub or source.path}, lane {lane}", read, rows, source.shuffle, (self.seed, index, lane))
