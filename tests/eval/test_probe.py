"""The attentive probe learns what is in frozen features, and the sweep and probe programs read a run and write its tables."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from toy import save_toy_models, toy_config

from comp.config import ConfigError
from comp.config_io import to_dict
from comp.eval import probe, sweep
from comp.eval.probe import AttentiveProbe, LabelledImages, ProbeSettings, folder_images, learning_rate, probe_accuracy
from comp.model import VisionEncoder

SETTINGS = ProbeSettings(size=16, epochs=8, batch_size=16, lr=1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose trained models are the toy models it started from."""
    folder = tmp_path_factory.mktemp("run")
    save_toy_models(folder)
    config = toy_config(folder)
    run = folder / "runs" / "toy"
    (run / "models").mkdir(parents=True)
    (run / "models" / "III").symlink_to(folder)
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    return run


@pytest.fixture(scope="module")
def encoder(run):
    return VisionEncoder.from_pretrained(run / "models" / "III" / "vision").float()


def coloured(count: int, colours=("red", "blue", "white")) -> LabelledImages:
    labels = [i % len(colours) for i in range(count)]
    return LabelledImages([Image.new("RGB", (16, 16), colours[label]) for label in labels], labels, len(colours))


def test_probe_finds_what_the_features_hold(encoder):
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    assert probe_accuracy(encoder, coloured(48), coloured(30), SETTINGS) == 1.0
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())
    augmented = dataclasses.replace(SETTINGS, augment=True)
    assert probe_accuracy(encoder, coloured(48), coloured(30), augmented) == 1.0


def test_probe_cannot_find_what_they_do_not_hold(encoder):
    train, test = coloured(48, ("red", "red")), coloured(30, ("red", "red"))
    assert probe_accuracy(encoder, train, test, SETTINGS) == 0.5


def test_probe_pools_with_attention():
    """Planted: a query that answers to one token alone, whose value alone decides."""
    head = AttentiveProbe(width=4, num_classes=2, num_heads=3)
    assert head.num_heads == 2 and not any(name.endswith("bias") for name, _ in head.named_parameters())
    head.norm = nn.Identity()
    with torch.no_grad():
        head.key.weight.copy_(100 * torch.eye(4))
        head.value.weight.copy_(torch.eye(4))
        head.query.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))
        head.classifier.weight.copy_(torch.eye(4)[[1, 3]])
    features = torch.tensor([[[0.0, 9.0, 0.0, 9.0], [5.0, 2.0, 5.0, 3.0], [0.0, 7.0, 0.0, 7.0]]])
    assert torch.allclose(head(features), torch.tensor([[2.0, 3.0]]))


def test_learning_rate_schedule():
    settings = ProbeSettings(lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, 100, 10, settings) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == pytest.approx(1) and rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_folder_in_imagenet_layout(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "ant"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "1.png")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    images = folder_images(tmp_path / "train")
    assert images.labels == [0, 1] and images.images[0].parent.name == "ant" and images.open(0).size == (4, 4)
    with pytest.raises(ConfigError, match="dog"):
        folder_images(tmp_path / "val", ["cat", "dog"])
    with pytest.raises(ConfigError, match="must hold"):
        folder_images(tmp_path / "missing")


def test_probe_program(run, tmp_path, monkeypatch):
    for split, count in (("train", 6), ("val", 3)):
        images = coloured(count)
        for index, (image, label) in enumerate(zip(images.images, images.labels)):
            (tmp_path / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / split / str(label) / f"{index}.png")
    assert probe.main([str(run), "--data", str(tmp_path), "--size", "16", "--epochs", "1", "--seeds", "2"]) == 0
    table = json.loads((run / "probe" / "table.json").read_text())
    assert [row[0] for row in table["rows"]] == ["before", "after"] and table["rows"][0] == ["before", *table["rows"][1][1:]]
    assert "6 training and 3 test images" in " ".join(table["text"].split())


def test_sweep_program(run):
    assert sweep.main([str(run), "--caps", "16", "4", "--questions", "4"]) == 0
    table = json.loads((run / "sweep" / "table.json").read_text())
    assert [row[0] for row in table["rows"]] == ["4", "16"]
    assert table["header"] == ["visual tokens at most", "colour", "shape", "overall"] and "4 held-out" in table["text"]
    assert (run / "sweep" / "sweep.png").is_file()


def test_sweep_caps_visual_tokens(run, monkeypatch):
    seen = []
    original = sweep.answer_questions

    def spy(model, samples, encoder, **kwargs):
        seen.append(max(encoder.encode_prompt(samples[i]).num_visual_tokens for i in kwargs["indices"]))
        return original(model, samples, encoder, **kwargs)

    monkeypatch.setattr(sweep, "answer_questions", spy)
    sweep.sweep(sweep.trained_config(run), [4, 16], 6)
    assert seen[0] <= 4 < seen[1] <= 16


def test_refusals(run, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        sweep.trained_config(tmp_path)
    with pytest.raises(ConfigError, match="stage must be one of"):
        sweep.trained_config(run, "IV")
    with pytest.raises(ConfigError, match="not finished"):
        sweep.trained_config(run, "I")
