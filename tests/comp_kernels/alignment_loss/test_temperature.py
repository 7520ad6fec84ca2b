"""Proposed temperatures: against closed forms, the paper's own case, and what scaling must do."""

import math

import numpy
import pytest
import torch

from comp_kernels import propose_temperature, temperature_for_entropy
from comp_kernels.ops.alignment_loss import temperature
from comp_kernels.ops.alignment_loss.temperature import PAPER, PAPER_ENTROPY, random_cosines, softmax_entropy


def test_two_words_by_hand():
    """softmax([0, -d] / t) = (0.8, 0.2) where d / t = log 4; its entropy is known."""
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    scores = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    assert temperature_for_entropy(scores, entropy) == pytest.approx(0.7 / math.log(4), rel=1e-3)


@pytest.mark.parametrize("entropy", [0.05, 1.0, 2.5])
def test_the_entropy_is_the_one_asked_for_at_any_scale(entropy):
    scores = torch.randn(8, 20)
    found = temperature_for_entropy(scores, entropy)
    assert softmax_entropy(scores, found).mean().item() == pytest.approx(entropy, rel=2e-3)
    assert temperature_for_entropy(1e4 * scores + 7, entropy) == pytest.approx(1e4 * found, rel=1e-3)


def test_one_sure_row_does_not_stop_the_others():
    scores = torch.tensor([[5.0, 0.0, 0.0, 0.0], [1.0, 0.9, 0.8, 0.7]])
    found = temperature_for_entropy(scores, 0.6)
    assert softmax_entropy(scores, found).mean().item() == pytest.approx(0.6, rel=2e-3)


def test_random_cosines_are_those_of_directions_on_the_sphere():
    for width in (2, 7, 500):
        cosines = random_cosines(50, width, 2000)
        assert cosines.abs().max() <= 1
        assert cosines.square().mean().item() == pytest.approx(1 / width, rel=0.03)
    explicit = torch.nn.functional.normalize(torch.randn(20000, 7), dim=1)[:, 0]
    levels = torch.tensor([0.05, 0.5, 0.95])
    torch.testing.assert_close(random_cosines(50, 7, 2000).quantile(levels), explicit.quantile(levels), rtol=0.05, atol=0.02)


def test_simulation_leaves_the_callers_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = propose_temperature(16, 100)
    assert torch.equal(torch.rand(1), expected) and propose_temperature(16, 100) == first


def test_simulation_is_the_same_in_every_surrounding(monkeypatch):
    first = propose_temperature(16, 100)
    monkeypatch.setattr(torch, "manual_seed", None)  # would seed every GPU
    torch.set_default_dtype(torch.float64)
    try:
        assert propose_temperature(16, 100) == first
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert propose_temperature(numpy.int64(16), 100) == first


def test_the_papers_case_gives_the_papers_temperature():
    """The constant, from draws of its own, and the proposal at the paper's sizes: single rows differ by a nat."""
    scores = random_cosines(48, PAPER["width"], PAPER["vocabulary"], seed=1)
    entropies = softmax_entropy(scores, PAPER["temperature"])
    assert abs(entropies.mean().item() - PAPER_ENTROPY) < 3 * entropies.std().item() / len(entropies) ** 0.5
    assert propose_temperature(PAPER["width"], PAPER["vocabulary"]) == pytest.approx(PAPER["temperature"], rel=0.1)


def test_soft_targets_follow_the_formula():
    """Far above the freezing temperature the entropy is log V - 1 / (2 D t^2) (README)."""
    width, vocabulary = 400, 20_000
    for lost in (0.1, 0.5):
        expected = 1 / math.sqrt(2 * width * lost)
        assert propose_temperature(width, vocabulary, entropy=math.log(vocabulary) - lost) == pytest.approx(expected, rel=0.03)


def test_narrow_features_need_more():
    proposals = [propose_temperature(width, 512) for width in (24, 96, 384)]
    assert proposals == sorted(proposals, reverse=True)
    assert proposals[1] == pytest.approx(2 * proposals[2], rel=0.1), "a softmax over cosines of std 1 / sqrt(D)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: propose_temperature(1, 100), "width must be an integer of at least 2, got 1"),
        (lambda: propose_temperature(96, 1), "vocabulary must be an integer of at least 2, got 1"),
        (lambda: propose_temperature(96.0, 10), "width must be an integer"),
        (lambda: propose_temperature(96, 5), "entropy must be less than log"),
        (lambda: temperature_for_entropy(torch.zeros(2, 8), 0.5), "share the maximum"),
        (lambda: temperature_for_entropy(torch.tensor([[1.0, 1.0, 0.0]]), 0.5), "share the maximum"),
        (lambda: temperature_for_entropy(torch.tensor([[1.0, torch.inf]]), 0.5), "scores must be finite"),
        (lambda: temperature_for_entropy(torch.zeros(0, 8), 0.5), "at least one row"),
        (lambda: temperature_for_entropy(torch.rand(2, 8), 0.0), "entropy must be"),
        (lambda: temperature_for_entropy(torch.rand(8), 1.0), r"scores must be a tensor \[n, V\]"),
        (lambda: temperature_for_entropy(torch.ones(2, 8, dtype=torch.int64), 1.0), "scores must be float32"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_number_of_rows_fits_the_vocabulary():
    assert temperature.MIN_ROWS * PAPER["vocabulary"] < 8e6, "a proposal takes seconds, not minutes"
