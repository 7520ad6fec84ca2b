"""Frozen segmentation: scores against hand-made ones, labels that meet their pixels, and heads that learn planted classes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import save_toy_models, toy_config

from comp.config import ConfigError
from comp.config_io import to_dict
from comp.data.batch import IGNORED, BadSampleError
from comp.model import VisionEncoder
from comp.studies.segmentation import segment
from comp.studies.segmentation.data import annotated_folder, augmented_square
from comp.studies.segmentation.heads import make_head
from comp.studies.segmentation.segment import (
    AugmentedCrops,
    CachedCrops,
    SegmentationSettings,
    areas,
    class_ious,
    evaluate_heads,
    feature_maps,
    mean_class_accuracy,
    mean_iou,
    pixel_accuracy,
    train_head,
)

SETTINGS = SegmentationSettings(head="linear", crop=16, iterations=60, warmup=5, batch_size=4, lr=3e-2)
COLOURS = ((255, 255, 255), (220, 40, 40), (40, 60, 200))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose trained models are the toy models it started from."""
    folder = tmp_path_factory.mktemp("run")
    save_toy_models(folder)
    run = folder / "runs" / "toy"
    (run / "models").mkdir(parents=True)
    (run / "models" / "III").symlink_to(folder)
    (run / "config.json").write_text(json.dumps(to_dict(toy_config(folder))))
    return run


@pytest.fixture(scope="module")
def encoder(run):
    return VisionEncoder.from_pretrained(run / "models" / "III" / "vision").float().eval()


def write_folder(folder: Path, counts=(6, 3), classes="paper\nred\nblue\n") -> Path:
    """Coloured rectangles on paper, odd sizes, soft borders ignored."""
    rng = np.random.default_rng(0)
    for split, count in zip(("training", "validation"), counts):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            height, width = (int(side) for side in rng.integers(17, 41, size=2))
            annotation = np.ones((height, width), np.uint8)
            top, left = int(rng.integers(height - 12)), int(rng.integers(width - 12))
            annotation[top : top + 12, left : left + 12] = 0
            annotation[top + 1 : top + 11, left + 1 : left + 11] = 2 + number % 2
            picture = np.array(COLOURS, np.uint8)[np.where(annotation == 0, 2 + number % 2, annotation) - 1]
            Image.fromarray(picture).save(folder / "images" / split / f"{number}.png")
            Image.fromarray(annotation).save(folder / "annotations" / split / f"{number}.png")
    (folder / "classes.txt").write_text(classes)
    return folder


# --- scores ------------------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    """Class 0: 2 of 3 found and one claimed wrongly; class 1: 1 of 3; class 2 is only claimed, class 3 nowhere."""
    labels = torch.tensor([[0, 0, 0, 1], [1, IGNORED, IGNORED, 1]])
    found = torch.tensor([[0, 0, 1, 1], [0, 3, 0, 2]])
    sums = areas(found, labels, 4).double()
    assert sums.tolist() == [2, 1, 0, 0, 3, 2, 1, 0, 3, 3, 0, 0]
    assert class_ious(sums)[:3].tolist() == pytest.approx([2 / 4, 1 / 4, 0]) and class_ious(sums)[3].isnan()
    assert mean_iou(sums).item() == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)  # a class that is claimed but nowhere counts as 0
    assert mean_class_accuracy(sums).item() == pytest.approx((2 / 3 + 1 / 3) / 2)  # only classes that are labelled
    assert pixel_accuracy(sums).item() == pytest.approx(3 / 6)


def test_a_picture_without_any_label_counts_nothing():
    assert areas(torch.zeros(4, 4).long(), torch.full((4, 4), IGNORED), 3).tolist() == [0] * 9


# --- data --------------------------------------------------------------------------------------------------------------------


def test_folder_in_ade20k_layout(tmp_path):
    images = annotated_folder(write_folder(tmp_path), "training")
    assert list(images.classes) == ["paper", "red", "blue"] and len(images.pairs) == 6
    picture, annotation = images.open(0)
    labels = images.labels(annotation)
    assert labels.shape == (picture.height, picture.width) and set(labels.unique().tolist()) == {IGNORED, 0, 1}
    assert (np.array(picture)[(labels == 1).numpy()] == COLOURS[1]).all()
    assert len(images.first(2).pairs) == 2
    (tmp_path / "classes.txt").write_text("paper\nred\nblue")  # no line end after the last
    assert list(annotated_folder(tmp_path, "training").classes) == ["paper", "red", "blue"]


def test_refused_folders(tmp_path):
    with pytest.raises(ConfigError, match="--num-classes"):
        annotated_folder(tmp_path, "training")
    with pytest.raises(ConfigError, match="must hold pictures"):
        annotated_folder(tmp_path, "training", num_classes=3)
    write_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"holds the value 3, but there are 2 classes"):
        images = annotated_folder(tmp_path, "training", num_classes=2)
        images.labels(images.open(1)[1])
    Image.new("L", (3, 3), 1).save(tmp_path / "annotations" / "training" / "0.png")
    with pytest.raises(ConfigError, match="its picture"):
        annotated_folder(tmp_path, "training").open(0)
    Image.new("RGB", (3, 3)).save(tmp_path / "annotations" / "training" / "1.png")
    with pytest.raises(ConfigError, match="one byte per pixel"):
        annotated_folder(tmp_path, "training").open(1)
    annotation = tmp_path / "annotations" / "training" / "2.png"
    annotation.write_bytes(annotation.read_bytes()[:-30])
    with pytest.raises(BadSampleError, match=r"a probe: annotation .*2\.png: "):
        annotated_folder(tmp_path, "training").open(2)
    (tmp_path / "annotations" / "training" / "2.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of 6 pictures .*2\.png"):
        annotated_folder(tmp_path, "training")


def test_augmented_squares_keep_labels_on_their_pixels(tmp_path):
    images = annotated_folder(write_folder(tmp_path), "training")
    torch.manual_seed(0)
    sizes = set()
    for index in [0, 1, 2, 3] * 4:
        picture, annotation = augmented_square(*images.open(index), 32)
        assert picture.size == annotation.size == (32, 32)
        pixels, values = np.array(picture).astype(int), np.array(annotation)
        sizes.add(int((values == 0).sum()))
        for value, (more, less) in ((2, (0, 2)), (3, (2, 0))):  # the colours of COLOURS[1] and COLOURS[2], however changed
            inside = values == value
            inside &= np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1)
            if inside.any():
                assert (pixels[inside][:, more] >= pixels[inside][:, less]).all()
    assert len(sizes) > 4


# --- features and heads ------------------------------------------------------------------------------------------------------


def test_feature_maps_do_not_depend_on_what_is_packed_with_them(encoder):
    images = [Image.effect_noise(size, 60).convert("RGB") for size in ((40, 24), (17, 33), (8, 8))]
    together = feature_maps(encoder, images)
    for image, packed in zip(images, together):
        (alone,) = feature_maps(encoder, [image])
        assert torch.allclose(alone, packed, atol=1e-5)
    patch = encoder.config.patch_size
    assert together[0].shape == (4, encoder.config.width, 24 // patch, 40 // patch)
    (_, taps) = encoder(*(lambda x, grid: (x, torch.tensor([grid])))(*encoder.prepare(images[0])), return_layers=[-1])
    last = torch.nn.functional.layer_norm(taps[-1], taps[-1].shape[-1:])
    assert torch.allclose(together[0][3].flatten(1).sum(1), last.sum(0), atol=1e-3)
    assert torch.allclose(together[0][3, :, 0, 1], last[1], atol=1e-5)  # first row, second column: second of the first block
    assert torch.allclose(together[0][3, :, 1, 0], last[2], atol=1e-5)  # merge-block order undone


@pytest.mark.parametrize("kind", ["linear", "upernet"])
@pytest.mark.parametrize("patch_size", [8, 14, 16])
def test_heads_take_maps_of_any_size(kind, patch_size):
    head = make_head(kind, width=8, patch_size=patch_size, num_classes=5, channels=4).eval()
    for size in ((1, 1), (3, 7), (12, 12)):
        scores = head(torch.randn(4, 2, 8, *size))
        times = 1 if kind == "linear" else {8: 2, 14: 4, 16: 4}[patch_size]
        assert scores.shape == (2, 5, size[0] * times, size[1] * times)
    with pytest.raises(ValueError, match="'linear' or 'upernet'"):
        make_head("mlp", 8, 8, 2, 4)


def test_cached_squares_are_windows_with_their_labels(encoder, tmp_path):
    images = annotated_folder(write_folder(tmp_path), "training")
    crops = CachedCrops(encoder, images, dataclasses.replace(SETTINGS, crop=48))  # larger than every picture
    maps, labels = crops([0, 1])
    side = 48 // encoder.config.patch_size
    assert maps.shape == (4, 2, encoder.config.width, side, side) and labels.shape == (2, 48, 48)
    rows, columns = crops.maps[0].shape[2:]
    assert torch.equal(maps[:, 0, :, :rows, :columns], crops.maps[0]) and (maps[:, 0, :, rows:] == 0).all()
    assert (labels[0, rows * encoder.config.patch_size :] == IGNORED).all() and (labels[0] >= 0).any()


@pytest.mark.parametrize("source", [CachedCrops, AugmentedCrops])
def test_heads_learn_planted_classes(encoder, tmp_path, source):
    folder = write_folder(tmp_path, counts=(8, 4))
    train, test = (annotated_folder(folder, split) for split in ("training", "validation"))
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    head = train_head(encoder, source(encoder, train, SETTINGS), 8, 3, SETTINGS)
    counts, examples = evaluate_heads(encoder, [head, head], test, SETTINGS)
    assert counts.shape == (2, 4, 9) and torch.equal(counts[0], counts[1])
    assert pixel_accuracy(counts[0].sum(0).double()) > 0.85
    assert [tuple(e.shape) for e in examples] == [test.labels(test.open(i)[1]).shape for i in range(4)]
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())


def test_program(run, tmp_path, capsys):
    folder = write_folder(tmp_path / "shapes", classes="paper\nred\nblue\nnever\n")  # a class that is nowhere
    command = [str(run), "--data", str(folder), "--crop", "16", "--iterations", "2", "--seeds", "2", "--channels", "4"]
    command += ["--device", "cpu", "--batch-size", "2", "--settings", "small"]
    assert segment.main(command) == 0
    result = run / "probes" / "shapes-upernet"
    table = json.loads((result / "table.json").read_text())
    assert table["header"][:5] == ["encoder", "mIoU", "change", "mAcc", "aAcc"] and "nan" not in table["rows"][0][1]
    assert [row[0] for row in table["rows"]] == ["before", "III"] and table["rows"][1][2] == "+0.00 ± 0.00"
    assert (result / "examples.png").is_file() and "mIoU" in capsys.readouterr().out
    for wrong, message in ((["--crop", "15"], "multiple of"), (["--batch-size", "1"], "at least 2")):
        with pytest.raises(SystemExit):
            segment.main([*command, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        segment.main([str(tmp_path / "nowhere"), *command[1:]])
    assert "config.json" in capsys.readouterr().err and not (tmp_path / "nowhere").exists()
