"""Mixtures: several sources sampled by strategy and joined, and the order in which training visits them.

YAML mixtures use LLaVA's form; `json_path` and `images` are relative to the YAML file, or to `root` where that is given, a
folder relative to the one that the run is started in:

    root: data                            # optional
    datasets:
      - json_path: blip558k.json
        sampling_strategy: all            # all, first:N, end:N, random:N; N a count or P%
        images: /data/blip558k            # optional: the folder of json_path without it
        images_anywhere: true             # optional: image names may lead out of it
        samples, source, licence: ...     # optional: told where the file is missing
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config import ConfigError, SourceConfig, parse_sampling
from .batch import Sample
from .datasets import Dataset, LlavaDataset, dataset_from_factory

TOLD = ("samples", "source", "licence")
"""Fields of an entry of a YAML mixture that are only shown, where its file is missing."""


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture, restricted to chosen indices."""

    source: str
    """Identifies the dataset: the same in every stage that reads it."""
    dataset: Dataset
    indices: np.ndarray


class Mixture:
    """Several datasets, each restricted to chosen indices, as one dataset."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part.indices) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        part, index_in_part = self._find(index)
        sample = part.dataset[index_in_part]
        if not isinstance(sample, Sample):
            raise ConfigError(
                f"items of a dataset must be comp.data.batch.Sample, those of {part.dataset!r:.80} are {type(sample)}"
            )
        return sample

    def sizes(self) -> list[int]:
        """Samples of each dataset, those that are not chosen included: the order of training follows from them."""
        return [len(part.dataset) for part in self._parts]

    def place(self, index: int) -> str:
        """Which sample this is, whatever it says of itself: equal for one sample in several stages, else different."""
        part, index_in_part = self._find(index)
        return f"{part.source}[{index_in_part}]"

    def _find(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"the mixture has {len(self)} samples, asked for {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, int(part.indices[index - self._ends[number]])


def open_sources(sources: Sequence[SourceConfig], seed: int) -> Mixture:
    """The mixture of `sources`; `seed` draws the samples of "random:N"."""
    check_files(sources)
    parts: list[Part] = []
    for source in sources:
        for name, dataset, sampling in _open_source(source):
            rng = np.random.default_rng([seed, len(parts)])
            parts.append(Part(name, dataset, choose_indices(len(dataset), sampling, rng)))
    mixture = Mixture(parts)
    if len(mixture) == 0:
        raise ConfigError(f"no sample in {[source.path or source.factory for source in sources]}")
    return mixture


def choose_indices(size: int, sampling: str, rng: np.random.Generator) -> np.ndarray:
    """Indices that a sampling strategy picks from `size` samples; a percentage rounds up, "random" draws without repetition."""
    strategy, amount, is_percent = parse_sampling(sampling)
    count = int(np.ceil(size * amount / 100)) if is_percent else int(amount)
    if count > size:
        raise ConfigError(f"data.sampling {sampling!r} asks for {count} samples of a source that has {size}")
    if strategy == "end":
        return np.arange(size - count, size)
    if strategy == "random":
        return rng.permutation(size)[:count]
    return np.arange(count)


def _open_source(source: SourceConfig) -> Iterator[tuple[str, Dataset, str]]:
    """(name, dataset, sampling) of every dataset in a source."""
    if source.hub is not None:
        raise ConfigError(f"data.hub {source.hub} is a stream, which only stages of training read; name a path or a factory")
    if source.factory is not None:
        name = f"{source.factory}({source.arguments})"
        yield name, dataset_from_factory(source.factory, source.arguments), source.sampling
        return
    assert source.path is not None  # SourceConfig: one of the two
    path = Path(source.path)
    if path.suffix in (".yaml", ".yml"):
        yield from _open_yaml(path, source)
    else:
        yield _open_file(path, source.images, source.images_anywhere, source.sampling)


def _open_file(path: Path, images: str | Path | None, images_anywhere: bool, sampling: str) -> tuple[str, Dataset, str]:
    return str(path.resolve()), LlavaDataset(path, images, images_anywhere=images_anywhere), sampling


def check_files(sources: Iterable[SourceConfig]) -> None:
    """ConfigError that names every file that `sources` lack, with what their mixtures say of it, before any is read."""
    lacking: dict[str, str] = {}
    for source in sources:
        if source.path is None or Path(source.path).suffix not in (".yaml", ".yml"):
            continue
        root, entries = _read_yaml(Path(source.path), source)
        for entry in entries:
            path = root / entry["json_path"]
            if not path.is_file():
                known = [f"{name} {entry[name]}" for name in TOLD if name in entry]
                lacking[str(path)] = f"  {path}" + "".join(f"\n      {line}" for line in known)
    if lacking:
        raise ConfigError(
            f"{len(lacking)} files of the mixtures are missing (docs/checkpoints.md):\n" + "\n".join(lacking.values())
        )


def _read_yaml(path: Path, source: SourceConfig) -> tuple[Path, list[dict[str, Any]]]:
    """Where the names of a mixture start, and its entries."""
    if source.sampling != "all":
        raise ConfigError(f"data.sampling of {path} must be all: the entries of a YAML mixture carry their own strategies")
    if not path.is_file():
        raise ConfigError(f"data.path {path} is not a file")
    try:
        content = yaml.safe_load(path.read_bytes())  # UTF-8 whatever the locale says
    except yaml.YAMLError as error:
        raise ConfigError(f"data.path {path} is not valid YAML: {error}") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f'{path} must hold a list "datasets"')
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}, datasets[{number}] must be a mapping, got {entry!r}")
        unknown = set(entry) - {"json_path", "sampling_strategy", "images", "images_anywhere", *TOLD}
        if unknown or not isinstance(entry.get("json_path"), str):
            raise ConfigError(
                f"{path}, datasets[{number}]: needs json_path, may have sampling_strategy, images, images_anywhere and "
                f"{', '.join(TOLD)}; got {sorted(map(str, entry))}"
            )
        anywhere = entry.get("images_anywhere", source.images_anywhere)
        if not isinstance(anywhere, bool):
            raise ConfigError(f"{path}, datasets[{number}]: images_anywhere must be true or false, got {anywhere!r}")
        if not isinstance(entry.get("images"), str | None):
            raise ConfigError(f"{path}, datasets[{number}]: images must be the name of a folder, got {entry['images']!r}")
    root = content.get("root")
    if not isinstance(root, str | None):
        raise ConfigError(f"{path}: root must be the name of a folder, got {root!r}")
    return path.parent if root is None else Path(root), entries


def _open_yaml(path: Path, source: SourceConfig) -> Iterator[tuple[str, Dataset, str]]:
    root, entries = _read_yaml(path, source)
    for entry in entries:
        images = entry.get("images", source.images)
        yield _open_file(
            root / entry["json_path"],
            None if images is None else root / images,
            entry.get("images_anywhere", source.images_anywhere),
            str(entry.get("sampling_strategy", "all")),
        )


class SampleOrder:
    """The endless order of samples: a permutation per epoch, computed from (seed, epoch), so any position can be resumed."""

    def __init__(self, size: int, seed: int):
        self.size = size
        self.seed = seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            self._epoch = epoch
        return int(self._permutation[offset])
