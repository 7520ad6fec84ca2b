"""Training data step by step: step s takes the next `batch_size` samples of the shuffled mixture, each rank a share of them.

A step depends on nothing but its number, the seed and the ranks, so any step can be resumed, with any number of workers.
"""

from __future__ import annotations

import math
import os
import signal
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .batch import Batch
from .datasets import BadSampleError, Dataset
from .encode import SampleEncoder
from .mixture import Mixture, SampleOrder
from .packing import EncodedSample, collate, pack, share_out

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


class StepDataset(torch.utils.data.Dataset):
    """Item s is the `StepData` of optimiser step s.

    padded:  rows of text cost as much as the longest of their forward pass.
    cost:    the samples of a step are then shared out among the processes by what
             `SampleEncoder.estimate` says of them, not by number. Every process estimates all of them.
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
        forward_visual_tokens: int | None = None,
        forward_text_tokens: int | None = None,
        padded: bool = False,
        cost: Cost | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.samples = samples
        self.encoder = encoder
        self.batch_size = batch_size
        self.num_positions = max(1, round(epochs * len(samples)))
        whole = math.ceil(self.num_positions / batch_size)
        self.num_steps = min(whole, max_steps or whole)
        self.pack = partial(pack, visual_tokens=forward_visual_tokens, text_tokens=forward_text_tokens, padded=padded)
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
        groups = self.pack(encoded)
        pad_id, patch_features = self.encoder.template.pad_id, self.encoder.patch_features
        return StepData(
            step=step,
            batches=[collate(group, pad_id=pad_id, patch_features=patch_features) for group in groups],
            num_samples=len(encoded),
            num_images=sum(len(s.grids) for s in encoded),
            num_text_tokens=sum(len(s.input_ids) for s in encoded),
            num_visual_tokens=sum(s.num_visual_tokens for s in encoded),
            skipped=skipped,
            notes=list(notes),
            shares=shares,
        )

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


def iterate_steps(dataset: StepDataset, *, start: int, num_workers: int) -> Generator[StepData, None, None]:
    """Steps start, start + 1, ... of `dataset`, prepared ahead by `num_workers` processes, which end when it is closed."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, len(dataset)),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=_ignore_sigterm,
    )
    steps = iter(loader)
    try:
        yield from steps
    finally:  # the workers pass over SIGTERM, with which Python would end them when it exits, and wait for them
        if isinstance(steps, _MultiProcessingDataLoaderIter):
            steps._shutdown_workers()


def _ignore_sigterm(worker: int) -> None:
    """Schedulers send SIGTERM to whole process groups; the trainer still needs its workers to finish a step and save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
