"""Retrieval of a page's text by what is seen of it: the mean of its visual tokens against the mean of its word embeddings.

Among 256 held-out pages, which texts are nearer than the page's own? The word embeddings are those that the run started from,
so no tower is judged by words that moved with it. Two readings: the visual tokens of the run's adapter as they are, and the
tower's pooled features through a ridge regression onto the texts, which any tower can be asked and no adapter helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import Adapter, VisionEncoder
from ..tiny.scenes import Drawing
from .batches import in_batches
from .patches import NATIVE, probe_pages

CANDIDATES, FIT_PAGES = 256, 800
RIDGE = 0.01  # share of the mean variance of a feature that is added to the covariance

Encode = Callable[[str], Sequence[int]]
"""Text -> token ids."""


def page_sample(split: str, count: int) -> tuple[list[str], list[Drawing]]:
    """Texts and drawings of `count` pages no two of which hold the same characters: means of words do not know their order."""
    texts: list[str] = []
    drawings: list[Drawing] = []
    seen: set[str] = set()
    for scene, drawing in probe_pages(split, 2 * count):
        key = "".join(sorted(scene.text))
        if key not in seen and len(texts) < count:
            seen.add(key)
            texts.append(scene.text)
            drawings.append(drawing)
    if len(texts) < count:
        raise ValueError(f"count must be at most {len(texts)}, the different texts among {2 * count} pages, got {count}")
    return texts, drawings


def text_means(texts: Sequence[str], encode: Encode, embeddings: Tensor) -> Tensor:
    """[n, E]: mean word embedding of each text."""
    return torch.stack([embeddings[torch.tensor(encode(text))].float().mean(0) for text in texts])


@torch.no_grad()
def pooled(encoder: VisionEncoder, drawings: Sequence[Drawing], adapter: Adapter | None = None, batch: int = 50) -> Tensor:
    """[n, D] or, with an adapter, [n, E]: mean over the patches, or over the visual tokens, of each page at native size."""
    encoder.eval()
    device = encoder.patch_embed.weight.device
    means = []
    for chosen in in_batches(len(drawings), batch):
        images = [encoder.prepare(drawings[i].image, min_tokens=1, max_tokens=NATIVE) for i in chosen]
        features = encoder(torch.cat([p for p, _ in images]).to(device), torch.tensor([grid for _, grid in images]))
        lengths = [t * h * w for _, (t, h, w) in images]
        if adapter is not None:
            features, lengths = adapter(features), [n // encoder.config.merge_size**2 for n in lengths]
        means += [part.float().mean(0).cpu() for part in features.split(lengths)]
    return torch.stack(means)


def ridge_map(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The linear map from rows of x [n, D] to rows of y [n, E] with least squares and a penalty of `RIDGE`."""
    mean, std, centre = x.mean(0), x.std(0).clamp(min=1e-6), y.mean(0)
    z = (x - mean) / std
    weight = torch.linalg.solve(z.T @ z / len(z) + RIDGE * torch.eye(z.shape[1]), z.T @ (y - centre) / len(z))
    return lambda new: (new - mean) / std @ weight + centre


def reciprocal_ranks(seen: Tensor, texts: Tensor) -> Tensor:
    """1 / rank of the own text of each row by cosine, [n]; both sides are centred first, and ties count as half.

    The expectation for a guess is H_n / n: 0.024 among 256.
    """
    cosines = F.normalize(seen - seen.mean(0), dim=1) @ F.normalize(texts - texts.mean(0), dim=1).T
    own = cosines.diagonal().unsqueeze(1)
    better, ties = (cosines > own).sum(1), (cosines == own).sum(1) - 1
    return 1 / (1 + better + ties / 2)


def retrieval_by_adapter(encoder: VisionEncoder, adapter: Adapter, encode: Encode, embeddings: Tensor) -> Tensor:
    """Reciprocal ranks [CANDIDATES] with the visual tokens that the adapter makes."""
    texts, drawings = page_sample("heldout", CANDIDATES)
    return reciprocal_ranks(pooled(encoder, drawings, adapter), text_means(texts, encode, embeddings))


def retrieval_by_tower(encoder: VisionEncoder, encode: Encode, embeddings: Tensor) -> Tensor:
    """Reciprocal ranks [CANDIDATES] with the tower's pooled features through a ridge regression fitted to training pages."""
    fit = probe_pages("train", FIT_PAGES)
    to_text = ridge_map(
        pooled(encoder, [drawing for _, drawing in fit]), text_means([scene.text for scene, _ in fit], encode, embeddings)
    )
    texts, drawings = page_sample("heldout", CANDIDATES)
    return reciprocal_ranks(to_text(pooled(encoder, drawings)), text_means(texts, encode, embeddings))
