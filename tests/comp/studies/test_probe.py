"""The attentive probe learns what is in frozen features; the sweep and probe programs read a run and write its tables."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from toy import save_toy_models, toy_config

from comp.config import ConfigError
from comp.config_io import to_dict
from comp.model import VisionEncoder
from comp.runs import trained_config
from comp.studies import sweep
from comp.studies.probes import classify, frozen
from comp.studies.probes.classify import ACCURACY, AttentiveProbe, LabelledImages, ProbeSettings, correct_answers, folder_images
from comp.studies.probes.frozen import Measure, change_of, learning_rate, make_table, subset

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
    assert correct_answers(encoder, coloured(48), coloured(30), SETTINGS).all()
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())
    augmented = dataclasses.replace(SETTINGS, augment=True)
    assert correct_answers(encoder, coloured(48), coloured(30), augmented).all()


def test_probe_cannot_find_what_they_do_not_hold(encoder):
    train, test = coloured(48, ("red", "red")), coloured(30, ("red", "red"))
    assert correct_answers(encoder, train, test, SETTINGS).float().mean() == 0.5


def test_probe_learns_from_the_last_picture_of_an_epoch_too(encoder):
    """One that is alone in its batch counts: a probe of one picture, or of a batch and one more, learns its class."""
    blue = LabelledImages([Image.new("RGB", (16, 16), "blue")], [1], 2)
    assert correct_answers(encoder, blue, blue, dataclasses.replace(SETTINGS, epochs=40)).all()


def test_numbers_that_cannot_train_are_refused(run, capsys):
    for option, value, needed in (
        ("--epochs", "0", "more than 0"),
        ("--batch-size", "-1", "more than 0"),
        ("--lr", "nan", "more than 0"),
        ("--warmup-epochs", "-1", "at least 0"),
        ("--train-images", "0", "at least 1"),
    ):
        with pytest.raises(SystemExit):
            classify.main([str(run), option, value])
        said = capsys.readouterr().err
        assert option in said and f"must be {needed}, got {value}" in said


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
    for cosine, quarter in ((True, 0.1 + 0.9 * (0.5 + 0.5**1.5)), (False, 0.775)):
        rates = [learning_rate(step, 90, 10, settings, cosine=cosine) for step in range(91)]
        assert rates[0] == pytest.approx(1 / 11) and rates[10] == pytest.approx(1) and rates[50] == pytest.approx(0.55)
        assert rates[30] == pytest.approx(quarter) and rates[90] == pytest.approx(0.1)


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
    for name in ("cat", "ant"):
        (tmp_path / "val" / name / "1.png").unlink()
    with pytest.raises(ConfigError, match="no image"):
        folder_images(tmp_path / "val")


def test_a_damaged_picture_is_named(run, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        Image.effect_noise((40, 40), 50).save(tmp_path / split / "ant" / "1.png")
    whole = (tmp_path / "val" / "ant" / "1.png").read_bytes()
    (tmp_path / "val" / "ant" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit):
        classify.main([str(run), "--data", str(tmp_path), "--settings", "small", "--device", "cpu"])
    assert f"a probe: image {tmp_path}/val/ant/1.png: OSError" in capsys.readouterr().err


def test_probe_program(run, tmp_path, monkeypatch):
    for split, count in (("train", 6), ("val", 3)):
        images = coloured(count)
        for index, (image, label) in enumerate(zip(images.images, images.labels)):
            (tmp_path / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / split / str(label) / f"{index}.png")
    command = [str(run), "--data", str(tmp_path), "--size", "16", "--epochs", "1", "--seeds", "2", "--device", "cpu"]
    command += ["--settings", "small"]
    assert classify.main(command) == 0
    folder = run / "probes" / tmp_path.name
    table = json.loads((folder / "table.json").read_text())
    (before, after) = table["rows"]
    assert before[0] == "before" and after[0] == "III" and before[1] == after[1] and after[2] == "+0.00 ± 0.00"
    assert "6 training and 3 test images" in table["text"]

    # finished encoders are not measured again, unless what they depend on has changed
    measured = []
    original = classify.correct_answers
    monkeypatch.setattr(classify, "correct_answers", lambda *args: measured.append(args[4]) or original(*args))
    (folder / "III.pt").unlink()
    assert classify.main(command) == 0 and measured == [0, 1]
    assert classify.main([*command, "--train-images", "5"]) == 0 and measured == [0, 1, 0, 1, 0, 1]
    assert "5 training and 3 test images" in (folder / "table.json").read_text()
    with pytest.raises(SystemExit):
        classify.main([*command, "--test-images", "0"])


def test_table_of_outcomes():
    """Two probes on four images: 75% and 50% before, always right after."""
    hits = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    before = torch.stack((hits, torch.ones_like(hits)), dim=-1)
    table = make_table(
        {"before": before, "III": torch.ones_like(before)}, [ACCURACY, Measure("twice", lambda s: s[..., 0] / 2)]
    )
    assert table["header"] == ["encoder", "accuracy", "change", "twice"]
    assert table["rows"][0] == ["before", "62.50 ± 17.68", "", "125.0"]
    assert table["rows"][1][:2] == ["III", "100.00 ± 0.00"] and table["rows"][1][2].startswith("+37.50 ± ")


def test_standard_error_of_a_change_is_that_of_the_paired_difference():
    """Of an accuracy, that is the standard deviation of the differences over the root of their number."""
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.rand(3, 400, generator=generator).add(p).floor() for p in (0.6, 0.7))
    counts = [torch.stack((hits, torch.ones_like(hits)), dim=-1) for hits in (before, after)]
    change, error = change_of(*counts, ACCURACY)
    differences = 100 * (after - before).double().mean(0)
    assert change == pytest.approx(differences.mean().item(), abs=1e-6)
    assert error == pytest.approx(differences.std().item() / 20, rel=0.1)
    assert change_of(counts[0], counts[0], ACCURACY) == (0, 0)


def test_subset_keeps_order_and_stays_the_same():
    chosen = subset(range(100), 10)
    assert chosen == sorted(set(chosen)) == subset(range(100), 10) and len(chosen) == 10 and chosen != list(range(10))
    assert subset(range(3), 5) == subset(range(3), None) == [0, 1, 2]


@pytest.mark.parametrize(
    ("folder", "given", "start"),
    [
        (None, [], "small"),
        ("fashion-mnist", [], "small"),
        ("imagenet", [], "paper"),
        ("imagenet", ["--settings", "small"], "small"),
    ],
)
def test_the_papers_settings_are_the_defaults_for_real_data(folder, given, start):
    """Table 13; single options stand above both."""
    parser = argparse.ArgumentParser()
    frozen.add_options(parser, classify.ProbeSettings(), classify.PAPER)
    options = parser.parse_args(["RUN", *given, "--lr", "0.5", "--no-augment"])
    settings = frozen.settings_from(
        options, classify.ProbeSettings(), classify.PAPER, data=None if folder is None else Path("data") / folder
    )
    expected = dict(small=(64, 10, 64, 1e-5, 3), paper=(224, 10, 1024, 2e-5, 1))[start]
    assert (settings.size, settings.epochs, settings.batch_size, settings.min_lr, options.seeds) == expected
    assert settings.lr == 0.5 and not settings.augment and classify.PAPER.augment


def test_fingerprint_sees_weights_and_choices(encoder):
    first = frozen.fingerprint(encoder)
    mode = encoder.pos_mode
    encoder.pos_mode = "rope"
    assert frozen.fingerprint(encoder) != first
    encoder.pos_mode = mode
    assert frozen.fingerprint(encoder) == first
    with torch.no_grad():
        encoder.patch_embed.weight[0, 0] += 1
        assert frozen.fingerprint(encoder) != first
        encoder.patch_embed.weight[0, 0] -= 1


def test_sweep_program(run):
    assert sweep.main([str(run), "--caps", "16", "4", "--count", "4"]) == 0
    table = json.loads((run / "sweep" / "table.json").read_text())
    assert [row[0] for row in table["rows"]] == ["colour", "shape", "overall"] and table["total"]
    assert table["header"] == ["visual tokens at most", "4", "16"] and "4 held-out" in table["text"]
    assert (run / "sweep" / "sweep.png").is_file()


def test_sweep_caps_visual_tokens(run, monkeypatch):
    seen = []
    original = sweep.answer_questions

    def spy(model, samples, encoder, **kwargs):
        seen.append(max(encoder.encode_prompt(samples[i]).num_visual_tokens for i in kwargs["indices"]))
        return original(model, samples, encoder, **kwargs)

    monkeypatch.setattr(sweep, "answer_questions", spy)
    sweep.sweep(trained_config(run), [4, 16], 6)
    assert seen[0] <= 4 < seen[1] <= 16


def test_refusals(run, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        trained_config(tmp_path)
    with pytest.raises(ConfigError, match="stage must be one of"):
        trained_config(run, "IV")
    with pytest.raises(ConfigError, match="not finished"):
        trained_config(run, "I")
