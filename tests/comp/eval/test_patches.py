"""The probe of patches: average precision by hand, what a linear layer can and cannot find, and which patch is which."""

import numpy as np
import pytest
import torch
from PIL import Image

from comp.eval import patches
from comp.eval.patches import (
    PatchFeatures,
    mean_average_precision,
    page_draws,
    patch_features,
    probe_pages,
    probe_scores,
    probe_tower,
)
from comp.model import VisionEncoder, ViTConfig
from comp.tiny.pages import MARKS, mark_labels
from comp.tiny.scenes import Drawing, Mark


def make_encoder(patch_size: int = 8) -> VisionEncoder:
    tower = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=64)
    return VisionEncoder(
        ViTConfig.from_hugging_face({"model_type": "siglip_vision_model", "patch_size": patch_size, **tower}, pos_mode="abs")
    )


def column(values, labels, page=None) -> tuple[torch.Tensor, PatchFeatures]:
    """Scores and labels of one mark; no patch holds any other one."""
    scores, truth = torch.zeros(len(values), len(MARKS)), torch.zeros(len(values), len(MARKS))
    scores[:, 3], truth[:, 3] = torch.tensor(values), torch.tensor(labels, dtype=torch.float)
    page = torch.zeros(len(values), dtype=torch.long) if page is None else torch.tensor(page)
    return scores, PatchFeatures(torch.empty(len(values), 0), truth, page)


def test_average_precision_by_hand():
    scores, test = column([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
    assert mean_average_precision(scores, test).tolist() == pytest.approx([(1 / 1 + 2 / 3) / 2])
    scores, test = column([0.1, 0.8, 0.7, 0.9], [1, 0, 0, 0])
    assert mean_average_precision(scores, test).tolist() == pytest.approx([1 / 4])


def test_a_page_that_counts_twice_is_like_two_pages():
    scores, test = column([0.9, 0.8, 0.7, 0.1], [0, 1, 1, 0], page=[0, 1, 1, 0])
    twice = mean_average_precision(scores, test, torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
    # ranks: the first patch twice and wrong, then the two right ones
    assert twice.tolist() == pytest.approx([(1 / 3 + 2 / 4) / 2, 1.0])


def test_draws_of_pages_are_fixed_and_of_the_right_size():
    draws = page_draws(7, resamples=5)
    assert draws.shape == (5, 7) and draws.sum(1).eq(7).all() and torch.equal(draws, page_draws(7, resamples=5))


def synthetic(seed: int, informative: bool) -> PatchFeatures:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1500, 12, generator=generator)
    labels = torch.zeros(1500, len(MARKS))
    source = features if informative else torch.randn(1500, 12, generator=generator)
    for mark in range(5):
        labels[:, mark] = (source[:, mark] - source[:, mark + 5] > 2.0).float()
    return PatchFeatures(1000 * features + 5, labels, torch.arange(1500) // 15)


def test_the_probe_finds_what_is_linear_in_the_features_and_nothing_else():
    train, test = synthetic(0, True), synthetic(1, True)
    assert mean_average_precision(probe_scores(train, test), test).item() > 0.97
    train, test = synthetic(2, False), synthetic(3, False)
    rate = test.labels[:, :5].mean().item()
    assert mean_average_precision(probe_scores(train, test), test).item() < 2 * rate


def test_the_probe_has_no_seed():
    train, test = synthetic(0, True), synthetic(1, True)
    assert torch.equal(probe_scores(train, test), probe_scores(train, test))


def test_marks_fall_into_the_patch_of_their_centre():
    drawing = Drawing(Image.new("RGB", (80, 40)), (Mark("7", 79.9, 0.0, 0), Mark("blue", 15, 25, 0), Mark("1", 80.0, 5, 0)))
    labels = mark_labels(drawing, rows=4, columns=8)
    assert [tuple(place) for place in np.argwhere(labels)] == [(0, 7, MARKS.index("7")), (2, 1, MARKS.index("blue"))]


@pytest.mark.parametrize("cap", [128, 6])
def test_features_and_labels_belong_to_the_same_patch(cap):
    """Row by row as `VisionEncoder.encode` gives maps, whatever the cap and however pages are batched."""
    encoder = make_encoder()
    drawings = [drawing for _, drawing in probe_pages("train", 7)]
    found = patch_features(encoder, drawings, cap, batch=3)
    maps = [encoder.encode(d.image, min_tokens=1, max_tokens=cap)[0] for d in drawings]
    torch.testing.assert_close(found.features, torch.cat([m.flatten(0, 1) for m in maps]), rtol=1e-4, atol=1e-5)
    labels = [mark_labels(d, *m.shape[:2]).reshape(-1, len(MARKS)) for d, m in zip(drawings, maps)]
    assert np.array_equal(found.labels.numpy(), np.concatenate(labels))
    assert found.page.tolist() == [i for i, m in enumerate(maps) for _ in range(m.shape[0] * m.shape[1])]
    assert all(m.shape[0] * m.shape[1] // 4 <= cap for m in maps)


def test_held_out_pages_hold_other_scans_and_the_tower_stays(monkeypatch):
    assert probe_pages("train", 3)[0][0].text != probe_pages("heldout", 3)[0][0].text
    encoder = make_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    scores, test = probe_tower(encoder, pages=(12, 8))
    assert scores.shape == test.labels.shape and int(test.page.max()) == 7
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert 0 < mean_average_precision(scores, test).item() < 1


def test_pages_of_the_recipe_fit_the_native_cap():
    for split in ("train", "heldout"):
        for _, drawing in probe_pages(split, 60):
            width, height = drawing.image.size
            assert round(width / 16) * round(height / 16) <= patches.NATIVE
