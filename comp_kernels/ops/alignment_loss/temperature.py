"""Temperatures of the alignment loss for any width and vocabulary: those at which targets are as sharp as the paper's.

The derivation is in README.md, "Which temperature".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import check_float, check_integer, check_positive, check_tensor

PAPER = dict(width=896, vocabulary=151_657, temperature=0.005)
"""CoMP, arXiv 2503.18931v2, appendix C ("all temperature coefficients are 0.005"), with Qwen2.5-0.5B."""
PAPER_ENTROPY = 2.08
"""Nats: mean entropy of softmax over random cosines with `PAPER`, from 1,280 rows, standard error 0.03."""
MIN_ROWS, MAX_ROWS, MAX_SCORES = 32, 4096, 2**21  # of a simulation; single rows differ by 1 nat where few words hold the mass


def propose_temperature(width: int, vocabulary: int, *, entropy: float | None = None) -> float:
    """The temperature at which a softmax over random cosines is as sharp as with the paper's 0.005 at its width and vocabulary.

    Args:
        width:  D of features and prototypes, at least 2.
        vocabulary:  V, the number of prototypes, at least 2.
        entropy:  mean entropy of a target in nats, between 0 and log(vocabulary). None: `PAPER_ENTROPY`, for which 9 words are
            needed.

    Returns:
        A temperature for `epsilon` and `temperature` of `comp_kernels.alignment_loss`, by simulation with a fixed seed: the
        same on every call. Real word embeddings share directions, so real scores spread more widely and this is where to begin:
        `temperature_for_entropy` finds it from scores of your own texts.

    Raises:
        ValueError: sizes below 2, or an entropy that no temperature gives.
    """
    for name, value in (("width", width), ("vocabulary", vocabulary)):
        check_integer(name, value)
        if value < 2:
            raise ValueError(f"{name} must be an integer of at least 2, got {value!r}")
    rows = min(MAX_ROWS, max(MIN_ROWS, MAX_SCORES // vocabulary))
    return temperature_for_entropy(random_cosines(rows, width, vocabulary), PAPER_ENTROPY if entropy is None else entropy)


def temperature_for_entropy(scores: Tensor, entropy: float) -> float:
    """The temperature at which the rows of softmax(scores / temperature) have this mean entropy.

    Args:
        scores:  [n, V] float, for example cosines of pooled texts with word embeddings; finite, V at least 2.
        entropy:  nats, more than 0 and less than log(V).

    Raises:
        ValueError: scores or an entropy that do not fit; rows in which so many scores share the maximum that their entropy
            stays above `entropy` at any temperature.
    """
    check_tensor("scores", scores, "[n, V]", dim=2)
    check_float("scores", scores)
    check_positive("entropy", entropy)
    if scores.shape[0] < 1 or scores.shape[1] < 2 or not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be finite, with at least one row and two columns, got {tuple(scores.shape)}")
    if entropy >= math.log(scores.shape[1]):
        raise ValueError(f"entropy must be less than log(V) = {math.log(scores.shape[1]):.4f}, got {entropy}")
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores - scores.amax(1, keepdim=True)
    width = float(-scores.amin())  # of the widest row
    if not width > 0 or float(softmax_entropy(scores, 1e-9 * width).mean()) > entropy:
        raise ValueError(f"entropy {entropy} is below that of the scores that share the maximum of their row")
    low, high = math.log(1e-9 * width), math.log(width)
    while float(softmax_entropy(scores, math.exp(high)).mean()) < entropy:
        high += 2.0
    while high - low > 1e-4:  # the entropy grows with the temperature
        middle = (low + high) / 2
        below = float(softmax_entropy(scores, math.exp(middle)).mean()) < entropy
        low, high = (middle, high) if below else (low, middle)
    return math.exp(low)


def softmax_entropy(scores: Tensor, temperature: float) -> Tensor:
    """Entropy of softmax(scores / temperature) in nats: [n, V] -> [n]."""
    log_p = (scores / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def random_cosines(rows: int, width: int, vocabulary: int, seed: int = 0) -> Tensor:
    """[rows, vocabulary] float32: cosines of a fixed direction with independent directions, uniform on the sphere in `width`.

    A coordinate of a normalised Gaussian vector: g / sqrt(g^2 + the squares of the other width - 1 coordinates, chi-squared).
    The generator is our own and the rest is written out: torch.manual_seed would seed every GPU, and the same seed gives other
    numbers in another default dtype.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    g = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float32, device="cpu")
    others = 2 * torch._standard_gamma(torch.full_like(g, (width - 1) / 2), generator)
    return g / (g.square() + others).sqrt()
