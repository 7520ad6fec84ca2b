"""Retrieval of texts: ranks by hand, the ridge regression, and that what it finds is in the tower."""

import pytest
import torch
from test_patches import make_encoder

from comp.eval import retrieval
from comp.eval.retrieval import (
    page_sample,
    pooled,
    reciprocal_ranks,
    retrieval_by_adapter,
    retrieval_by_tower,
    ridge_map,
    text_means,
)
from comp.model import Adapter


def encode(text: str) -> list[int]:
    return [ord(character) % 64 for character in text]


def test_ranks_by_hand():
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert reciprocal_ranks(texts, texts).tolist() == [1.0] * 4
    turned = texts.roll(1, 0)  # the own text is at a right angle: one is nearer, and one is as near
    assert reciprocal_ranks(turned, texts).tolist() == [pytest.approx(1 / 2.5)] * 4
    assert reciprocal_ranks(-texts, texts).tolist() == [1 / 4] * 4
    assert reciprocal_ranks(texts + 100, 3 * texts - 7).tolist() == [1.0] * 4, "both sides are centred"


def test_a_guess_gives_the_harmonic_mean():
    ranks = torch.cat([reciprocal_ranks(torch.randn(256, 8), torch.randn(256, 8)) for _ in range(30)])
    expected = sum(1 / n for n in range(1, 257)) / 256
    assert ranks.mean().item() == pytest.approx(expected, rel=0.15)


def test_the_ridge_regression_finds_a_linear_map():
    x, weight = torch.randn(400, 10), torch.randn(10, 3)
    new = torch.randn(20, 10)
    torch.testing.assert_close(ridge_map(x, x @ weight + 5)(new), new @ weight + 5, rtol=0.05, atol=0.2)
    constant = torch.cat((x, torch.ones(400, 1)), dim=1)
    assert ridge_map(constant, x @ weight)(torch.ones(2, 11)).isfinite().all()


def test_texts_of_the_sample_hold_different_characters():
    texts, drawings = page_sample("heldout", 64)
    assert len(texts) == len(drawings) == len({"".join(sorted(text)) for text in texts}) == 64
    for text, drawing in zip(texts, drawings):
        assert text.replace("\n", "") == "".join(mark.text for mark in drawing.marks)


def test_means_of_words():
    embeddings = torch.randn(64, 5)
    found = text_means(["ab", "b"], encode, embeddings)
    torch.testing.assert_close(found, torch.stack([(embeddings[33] + embeddings[34]) / 2, embeddings[34]]))


def test_pooling_is_the_mean_of_the_maps_and_of_the_tokens():
    encoder, adapter = make_encoder(), Adapter(24, 16)
    _, drawings = page_sample("train", 5)
    maps = [encoder.encode(d.image, min_tokens=1, max_tokens=128)[0] for d in drawings]
    expected = torch.stack([m.flatten(0, 1).mean(0) for m in maps])
    torch.testing.assert_close(pooled(encoder, drawings, batch=2), expected, rtol=1e-4, atol=1e-5)
    assert pooled(encoder, drawings, adapter, batch=2).shape == (5, 16)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(retrieval, "CANDIDATES", 24)
    monkeypatch.setattr(retrieval, "FIT_PAGES", 60)


def test_what_the_tower_sees_is_found_and_what_it_does_not_is_not(few, monkeypatch):
    embeddings = torch.randn(64, 16)
    encoder = make_encoder()
    blind = retrieval_by_tower(encoder, encode, embeddings).mean()

    def counts(_, drawings, adapter=None, batch=50):
        return torch.stack([text_means(["".join(m.text for m in d.marks)], encode, torch.eye(64))[0] for d in drawings])

    monkeypatch.setattr(retrieval, "pooled", counts)
    assert retrieval_by_tower(encoder, encode, embeddings).mean() > 2 * blind


def test_by_adapter_needs_no_fit(few):
    embeddings, encoder = torch.randn(64, 16), make_encoder()
    ranks = retrieval_by_adapter(encoder, Adapter(24, 16), encode, embeddings)
    assert ranks.shape == (24,) and (ranks > 0).all() and (ranks <= 1).all()
