"""Encoded samples grouped under token budgets and collated: images without any padding, ids of text padded on the right."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import IGNORED, Batch


@dataclass(kw_only=True, slots=True)
class EncodedSample:
    """One sample as the model sees it."""

    name: str
    input_ids: list[int]
    labels: list[int]
    answer_ids: list[int]
    patches: list[Tensor]  # per image [h*w, C*P*P] float32 in merge-block order
    grids: list[tuple[int, int, int]]  # per image (1, h, w) in patches
    num_visual_tokens: int  # image tokens in input_ids


def pack(
    samples: Sequence[EncodedSample],
    *,
    visual_tokens: int | None = None,
    text_tokens: int | None = None,
    padded: bool = False,
) -> list[list[EncodedSample]]:
    """Group samples so that each group stays within both budgets; None is no limit.

    A group costs the sum of its visual tokens, and the sum of its lengths; where rows are `padded`, rows x longest length. As
    few groups as first fit over the samples from long to short finds, and without padding as even as they come: the largest
    one decides how much memory a step takes. Stable, so equal inputs give equal groups. A sample larger than a budget raises
    ValueError.
    """
    budget = _Budget(visual_tokens, text_tokens, padded)
    ordered = sorted(samples, key=lambda s: -len(s.input_ids))
    groups: list[list[EncodedSample]] = []
    for sample in ordered:
        if not budget.holds([sample]):
            raise ValueError(
                f"{sample.name}: {sample.num_visual_tokens} visual and {len(sample.input_ids)} text tokens exceed the budget "
                f"of one forward pass, {visual_tokens} and {text_tokens}"
            )
        home = next((group for group in groups if budget.holds([*group, sample])), None)
        if home is None:
            groups.append([sample])
        else:
            home.append(sample)
    shares = [] if padded else share_out([len(s.input_ids) for s in ordered], len(groups))
    even = [[ordered[index] for index in share] for share in shares]
    return even if even and all(map(budget.holds, even)) else groups


@dataclass(frozen=True)
class _Budget:
    visual_tokens: int | None
    text_tokens: int | None
    padded: bool

    def holds(self, group: Sequence[EncodedSample]) -> bool:
        visual = sum(s.num_visual_tokens for s in group)
        lengths = [len(s.input_ids) for s in group]
        text = len(group) * max(lengths) if self.padded else sum(lengths)
        fits = self.visual_tokens is None or visual <= self.visual_tokens
        return fits and (self.text_tokens is None or text <= self.text_tokens)


def share_out(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices of `costs` in `count` shares of about equal sums: the most expensive first, each to the share that has least."""
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [(0.0, 0, number) for number in range(count)]  # (cost, how many, which share)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, size, number = heapq.heappop(totals)
        shares[number].append(index)
        heapq.heappush(totals, (cost + costs[index], size + 1, number))
    return [sorted(share) for share in shares]


def collate(samples: Sequence[EncodedSample], *, pad_id: int, patch_features: int) -> Batch:
    """One `Batch`; `patch_features` is C*P*P, needed where no sample has an image."""
    patches = [p for s in samples for p in s.patches]
    grids = [g for s in samples for g in s.grids]
    rows = [row for row, s in enumerate(samples) for _ in s.grids]
    input_ids, attention_mask = pad_right([s.input_ids for s in samples], pad_id)
    answer_ids, answer_mask = pad_right([s.answer_ids for s in samples], pad_id)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=pad_right([s.labels for s in samples], IGNORED)[0],
        pixel_values=torch.cat(patches) if patches else torch.empty(0, patch_features),
        grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        image_sample=torch.tensor(rows, dtype=torch.int64),
        answer_ids=answer_ids,
        answer_mask=answer_mask,
        names=[s.name for s in samples],
    )


def empty_batch(*, pad_id: int, patch_features: int) -> Batch:
    """One text row without anything to learn: what a process runs when it has no samples left and the others still do."""
    sample = EncodedSample(
        name="", input_ids=[pad_id, pad_id], labels=[IGNORED] * 2, answer_ids=[], patches=[], grids=[], num_visual_tokens=0
    )
    return collate([sample], pad_id=pad_id, patch_features=patch_features)


def pad_right(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Lists of ids as [B, L] int64 with `value` after their ends, and the [B, L] bool mask of real entries; L is at least 1."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    out = torch.full(mask.shape, value, dtype=torch.int64)
    out[mask] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    return out, mask
