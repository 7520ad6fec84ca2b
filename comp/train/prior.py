"""Word prior of the alignment loss: how often each vocabulary item occurs in the texts that it aligns with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from ..data.batch import BadSampleError, Sample
from ..data.datasets import Dataset
from ..data.streams import Streams
from ..data.template import ChatTemplate
from ..parallel import ALONE, World

STREAMED = 20_000
"""Samples of a stream whose words are counted."""


def count_words(samples: Dataset | Streams, template: ChatTemplate, vocabulary_size: int, world: World = ALONE) -> Tensor:
    """[vocabulary_size] int64 counts of token ids in the alignment texts of `samples`, tokenised as in training, no template
    tokens; of a stream, of its first STREAMED samples.

    The processes of `world` share the work. No image is read. Unreadable samples are left out, as they are in training.
    """
    counts = torch.zeros(vocabulary_size, dtype=torch.int64)
    if isinstance(samples, Streams):
        own = samples.first_samples(STREAMED // world.size, range(world.rank, samples.lanes, world.size))
    else:
        own = _readable(samples, range(world.rank, len(samples), world.size))
    for texts in _in_chunks(template.alignment_text(sample) for sample in own):
        ids = [i for text_ids in template.encode_texts(texts) for i in text_ids]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocabulary_size)
    return torch.tensor(world.sum(counts.tolist()), dtype=torch.int64)


def _readable(samples: Dataset, indices: range) -> Iterator[Sample]:
    for index in indices:
        with suppress(BadSampleError):
            yield samples[index]


def _in_chunks(texts: Iterator[str], chunk: int = 4096) -> Iterator[list[str]]:
    """Tokenizing many at a time is several times faster than one by one."""
    while part := list(itertools.islice(texts, chunk)):
        yield part
