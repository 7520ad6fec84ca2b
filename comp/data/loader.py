"""Training data step by step: step s takes the next `batch_size` samples of the shuffled mixture, each rank a share of them.

A step depends on nothing but its number, the seed and the ranks, so any step can be resumed, with any number of workers.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..config import ConfigError
from .batch import BadSampleError, Batch
from .datasets import Dataset
from .encode import SampleEncoder
from .mixture import Mixture, SampleOrder
from .packing import EncodedSample, collate, pack, share_out
from .streams import Lane, State, Streams

# Tokenizers with threads of their own warn, and give the threads up, when data workers are forked after them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


Cost = Callable[[int, Sequence[int]], float]
"""(Tokens of text, patches of each image) of a sample -> work."""


class Skipped(NamedTuple):
    """One unusable sample."""

    place: str  # which one it is (`comp.data.mixture.Mixture.place`)
    message: str  # its name first


@dataclass(kw_only=True, slots=True)
class StepData:
    """One rank's share of one optimiser step."""

    step: int
    batches: list[Batch]  # one per forward pass; may be empty
    num_samples: int  # samples in `batches`
    num_images: int
    num_text_tokens: int  # without padding, visual tokens included
    num_visual_tokens: int
    skipped: list[Skipped]
    notes: list[str]  # what of the samples' records is not read (`Sample.notes`), each once
    shares: int = 0  # a digest of which process has which samples, where they are shared out by work
    lanes: dict[str, State] = field(default_factory=dict)  # of this rank's lanes after this step, where the stage is streamed


def step_data(
    step: int,
    encoded: Sequence[EncodedSample],
    skipped: list[Skipped],
    notes: list[str],
    encoder: SampleEncoder,
    packed: Callable[[Sequence[EncodedSample]], list[list[EncodedSample]]],
    **fields: Any,
) -> StepData:
    """Encoded samples packed and collated."""
    pad_id, patch_features = encoder.template.pad_id, encoder.patch_features
    return StepData(
        step=step,
        batches=[collate(group, pad_id=pad_id, patch_features=patch_features) for group in packed(encoded)],
        num_samples=len(encoded),
        num_images=sum(len(s.grids) for s in encoded),
        num_text_tokens=sum(len(s.input_ids) for s in encoded),
        num_visual_tokens=sum(s.num_visual_tokens for s in encoded),
        skipped=skipped,
        notes=notes,
        **fields,
    )


class StepDataset(torch.utils.data.Dataset):
    """Item s is the `StepData` of optimiser step s.

    cost:     the samples of a step are then shared out among the processes by what
              `SampleEncoder.estimate` says of them, not by number. Every process estimates all of them.
    budgets:  of a forward pass, see `pack`.
    """

    def __init__(
        self,
        samples: Dataset,
        encoder: SampleEncoder,
        *,
        batch_size: int,
        epochs: float,
        seed: int,
        max_steps: int | None = None,
        cost: Cost | None = None,
        rank: int = 0,
        world_size: int = 1,
        **budgets: Any,
    ):
        self.samples = samples
        self.encoder = encoder
        self.batch_size = batch_size
        self.num_positions = max(1, round(epochs * len(samples)))
        whole = math.ceil(self.num_positions / batch_size)
        self.num_steps = min(whole, max_steps or whole)
        self.pack = partial(pack, **budgets)
        self.cost = cost
        self.rank, self.world_size = rank, world_size
        self.order = SampleOrder(len(samples), seed)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> StepData:
        encoded: list[EncodedSample] = []
        skipped: list[Skipped] = []
        notes: dict[str, None] = {}
        positions, shares = self._share(step)
        for position in positions:
            index = self.order[position]
            try:
                sample = self.samples[index]
                notes |= dict.fromkeys(sample.notes)
                encoded.append(self.encoder.encode(sample, seed=(self.order.seed, position)))
            except BadSampleError as error:
                skipped.append(Skipped(self._place(index), str(error)))
        return step_data(step, encoded, skipped, list(notes), self.encoder, self.pack, shares=shares)

    def _place(self, index: int) -> str:
        return self.samples.place(index) if isinstance(self.samples, Mixture) else f"[{index}]"

    def _share(self, step: int) -> tuple[Sequence[int], int]:
        """Places of this rank's samples in the shuffled stream, and a digest of all shares; the last step may be smaller."""
        begin = step * self.batch_size
        step_positions = range(begin, min(begin + self.batch_size, self.num_positions))
        cost = self.cost
        if cost is None or self.world_size == 1:
            return step_positions[self.rank :: self.world_size], 0
        shares = share_out([self._estimate(self.order[p], cost) for p in step_positions], self.world_size)
        return [begin + i for i in shares[self.rank]], zlib.crc32(repr(shares).encode())

    def _estimate(self, index: int, cost: Cost) -> float:
        try:
            return cost(*self.encoder.estimate(self.samples[index]))
        except BadSampleError:
            return 0.0  # counted by the process that gets it


class StreamSteps:
    """Steps of a stage that is streamed (`comp.data.streams`): step s takes the next `batch_size` samples of the lanes in turn.

    Lanes are shared out among the ranks, and a rank's lanes among its workers, which read and encode; packing is done here.
    ConfigError where they cannot be shared out evenly.
    """

    def __init__(
        self,
        streams: Streams,
        encoder: SampleEncoder,
        *,
        batch_size: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
        **budgets: Any,
    ):
        if batch_size % streams.lanes or streams.lanes % world_size:
            raise ConfigError(
                f"lanes must divide batch_size and be divided by the number of processes, got lanes={streams.lanes}, "
                f"batch_size={batch_size}, {world_size} processes"
            )
        self.streams, self.encoder, self.pack = streams, encoder, partial(pack, **budgets)
        self.num_steps = num_steps
        self.lanes = range(rank, streams.lanes, world_size)
        self.num_samples = batch_size // world_size

    def __len__(self) -> int:
        return self.num_steps

    def iterate(self, *, start: int, num_workers: int, states: dict[str, State]) -> Generator[StepData, None, None]:
        """Steps start, start + 1, ...; `states` of all lanes after the steps before, as `StepData.lanes` gave them."""
        if num_workers and len(self.lanes) % num_workers:
            raise ConfigError(
                f"num_workers must divide the lanes of a process, got num_workers={num_workers} for {len(self.lanes)} of "
                f"{self.streams.lanes} lanes"
            )
        samples = _ahead(_LaneSamples(self, states), num_workers, prefetch=2 * self.num_samples // max(1, num_workers) or 2)
        with closing(samples):
            for step in range(start, self.num_steps):
                items = list(itertools.islice(samples, self.num_samples))
                yield step_data(
                    step,
                    [item.encoded for item in items if item.encoded is not None],
                    [item.skipped for item in items if item.skipped is not None],
                    list(dict.fromkeys(note for item in items for note in item.notes)),
                    self.encoder,
                    self.pack,
                    lanes={item.lane: item.state for item in items},
                )


class _LaneItem(NamedTuple):
    lane: str
    encoded: EncodedSample | None
    skipped: Skipped | None
    notes: list[str]
    state: State  # of the lane after this sample


class _LaneSamples(torch.utils.data.IterableDataset):
    """Encoded samples of a rank's lanes in turn. Worker w of n has the lanes w, w + n, ..., and torch asks workers in turn, so
    the order is the same for every n that divides the lanes."""

    def __init__(self, steps: StreamSteps, states: dict[str, State]):
        self.steps, self.states = steps, states

    def __iter__(self) -> Iterator[_LaneItem]:
        worker = torch.utils.data.get_worker_info()
        numbers = self.steps.lanes[worker.id :: worker.num_workers] if worker else self.steps.lanes
        if worker:  # `datasets` asks as well, and would share out each lane among the workers once more
            torch.utils.data.get_worker_info = lambda: None
        lanes = {n: Lane(self.steps.streams, n, self.states.get(f"{n}")) for n in numbers}
        for number, lane in itertools.cycle(lanes.items()):
            yield self._encoded(number, lane)

    def _encoded(self, number: int, lane: Lane) -> _LaneItem:
        place, sample = next(lane)
        encoded = skipped = None
        notes: list[str] = []
        try:
            if isinstance(sample, BadSampleError):
                raise sample
            notes = list(sample.notes)
            seed = (self.steps.streams.seed, number, lane.count)
            encoded = self.steps.encoder.encode(sample, seed=seed)
        except BadSampleError as error:
            skipped = Skipped(place, str(error))
        return _LaneItem(f"{number}", encoded, skipped, notes, lane.state())


def iterate_steps(
    dataset: StepDataset | StreamSteps, *, start: int, num_workers: int, states: dict[str, State] | None = None
) -> Generator[StepData, None, None]:
    """Steps start, start + 1, ... of `dataset`, prepared ahead by `num_workers` processes, which end when it is closed.

    states:  where the lanes of a stream stood before step `start`.
    """
    if isinstance(dataset, StreamSteps):
        return dataset.iterate(start=start, num_workers=num_workers, states=states or {})
    return _ahead(dataset, num_workers, prefetch=2, sampler=range(start, len(dataset)))


def _ahead(
    dataset: torch.utils.data.Dataset, num_workers: int, *, prefetch: int, **settings: Any
) -> Generator[Any, None, None]:
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        worker_init_fn=_ignore_signals,
        **settings,
    )
    items = iter(loader)
    try:
        yield from items
    finally:  # the workers ignore SIGTERM, by which Python ends them at exit: it would wait for them forever
        if isinstance(items, _MultiProcessingDataLoaderIter):
            items._shutdown_workers()


def _ignore_signals(worker: int) -> None:
    """Schedulers send SIGTERM, and terminals SIGINT, to whole process groups; the trainer still needs its workers to finish a
    step and save."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
