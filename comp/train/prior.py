"""Word prior of the alignment loss: how often each vocabulary item occurs in the texts that it aligns with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from ..data.datasets import BadSampleError, Dataset
from ..data.template import ChatTemplate
from ..parallel import World


def count_words(samples: Dataset, template: ChatTemplate, vocabulary_size: int, world: World | None = None) -> Tensor:
    """[vocabulary_size] int64 counts of token ids in the alignment texts of `samples`, tokenised as in training, no template
    tokens.

    The processes of `world` share the work. No image is read. Unreadable samples are left out, as they are in training.
    """
    rank, world_size = (0, 1) if world is None else (world.rank, world.size)
    counts = torch.zeros(vocabulary_size, dtype=torch.int64)
    for texts in _texts(samples, template, range(rank, len(samples), world_size)):
        ids = [i for text_ids in template.encode_texts(texts) for i in text_ids]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocabulary_size)
    return counts if world is None else torch.tensor(world.sum(counts.tolist()), dtype=torch.int64)


def _texts(samples: Dataset, template: ChatTemplate, indices: range, chunk: int = 4096) -> Iterator[list[str]]:
    """The texts in lists of up to `chunk`: tokenizing many at a time is several times faster than one by one."""
    texts: list[str] = []
    for index in indices:
        with suppress(BadSampleError):
            texts.append(template.alignment_text(samples[index]))
        if len(texts) == chunk:
            yield texts
            texts = []
    if texts:
        yield texts
