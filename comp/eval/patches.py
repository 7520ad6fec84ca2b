"""Linear probe of patches: does a frozen tower know, at native size, which mark lies in which patch?

Pages are those of the recipe `tiny`: scans and tables of the training split fit the probe, held-out ones test it. The probe is
one linear layer on standardised features, fitted to its optimum, so it has no seed. Any tower can be asked, at any cap on
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import to_raster
from ..model import VisionEncoder
from ..tiny.pages import mark_labels, random_scene
from ..tiny.scenes import Drawing, Scene
from .batches import RESAMPLES, in_batches

NATIVE = 128
"""Visual tokens that every page of `tiny` fits into unscaled, at patches of 8 pixels."""
TRAIN_PAGES, TEST_PAGES = 400, 300
PAGES_SEED = 2503
PENALTY = 1e-4  # on squared weights, beside the mean loss of a patch


@dataclass(frozen=True)
class PatchFeatures:
    """Patches of pages: features [N, D], labels [N, MARKS] in {0, 1}, and the page [N] that each belongs to."""

    features: Tensor
    labels: Tensor
    page: Tensor


@lru_cache
def probe_pages(split: str, count: int) -> tuple[tuple[Scene, Drawing], ...]:
    """The first `count` pages of a split for probes, in the shares of the recipe; their draws are no recipe's."""
    scenes = (random_scene(np.random.default_rng([PAGES_SEED, split == "heldout", index]), split) for index in range(count))
    return tuple((scene, scene.draw()) for scene in scenes)


@torch.no_grad()
def patch_features(
    encoder: VisionEncoder, pages: Sequence[Drawing], max_tokens: int = NATIVE, batch: int = 50
) -> PatchFeatures:
    """Features of every patch of `pages` at native size, pages above `max_tokens` visual tokens scaled down."""
    encoder.eval()
    device = encoder.patch_embed.weight.device
    features, labels, owner = [], [], []
    for chosen in in_batches(len(pages), batch):
        images = [encoder.prepare(pages[i].image, min_tokens=1, max_tokens=max_tokens) for i in chosen]
        packed, grids = torch.cat([patches for patches, _ in images]).to(device), torch.tensor([grid for _, grid in images])
        maps = to_raster(encoder(packed, grids), grids, encoder.config.merge_size)
        for i, one in zip(chosen, maps):
            _, height, width, _ = one.shape
            features.append(one.flatten(0, 2).float().cpu())
            labels.append(torch.from_numpy(mark_labels(pages[i], height, width)).flatten(0, 1))
            owner.append(torch.full((height * width,), i))
    return PatchFeatures(torch.cat(features), torch.cat(labels), torch.cat(owner))


def probe_scores(train: PatchFeatures, test: PatchFeatures, steps: int = 60) -> Tensor:
    """Logits [N, MARKS] of the test patches by a linear probe fitted to the training patches with L-BFGS."""
    mean, std = train.features.mean(0), train.features.std(0).clamp(min=1e-6)
    x, labels = (train.features - mean) / std, train.labels
    weight = torch.zeros(labels.shape[1], x.shape[1], requires_grad=True)
    rate = labels.mean(0).clamp(1e-4, 1 - 1e-4)
    bias = (rate / (1 - rate)).log().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight.T + bias, labels) * labels.shape[1]
        loss = loss + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (test.features - mean) / std @ weight.T + bias


def mean_average_precision(scores: Tensor, test: PatchFeatures, weights: Tensor | None = None) -> Tensor:
    """Mean over marks of the average precision, in [0, 1]; marks that no test patch holds are left out.

    scores:   [N, MARKS].
    weights:  [R, pages], how often each page counts in each of R draws; None: every page once. Returns [R].
    """
    num_pages = int(test.page.max()) + 1
    weights = torch.ones(1, num_pages) if weights is None else weights
    found = []
    for column in range(scores.shape[1]):
        if not bool(test.labels[:, column].any()):
            continue
        order = scores[:, column].argsort(descending=True, stable=True)
        times = weights[:, test.page[order]]  # [R, N]
        hits = times * test.labels[order, column]
        precision = hits.cumsum(1) / times.cumsum(1).clamp(min=1)
        found.append((precision * hits).sum(1) / hits.sum(1).clamp(min=1))
    return torch.stack(found).mean(0)


def probe_tower(
    encoder: VisionEncoder, max_tokens: int = NATIVE, pages: tuple[int, int] = (TRAIN_PAGES, TEST_PAGES)
) -> tuple[Tensor, PatchFeatures]:
    """(scores, test) of a tower at a cap on visual tokens, for `mean_average_precision`."""
    drawings = ([drawing for _, drawing in probe_pages(split, n)] for split, n in zip(("train", "heldout"), pages))
    train, test = (patch_features(encoder, chosen, max_tokens) for chosen in drawings)
    return probe_scores(train, test), test


def page_draws(num_pages: int, resamples: int = RESAMPLES // 5) -> Tensor:
    """[resamples, num_pages]: how often each page comes when as many are drawn with repetition; always the same draws, fewer
    than usual since each sorts and weighs every patch of every page."""
    drawn = torch.randint(num_pages, (resamples, num_pages), generator=torch.Generator().manual_seed(0))
    return torch.zeros(resamples, num_pages).scatter_add_(1, drawn, torch.ones(drawn.shape))
