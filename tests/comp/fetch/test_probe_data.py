"""The data of the probes, built from packages that are made up here: layouts, what is held out, and masks that fit."""

import gzip
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from comp.fetch import build, probes
from comp.fetch.build import split_of
from comp.fetch.stamps import cut_outs, held_out_captions
from comp.studies.probes.classify import digit_images, folder_images
from comp.studies.segmentation.data import annotated_folder


def test_digits_in_imagenet_layout(tmp_path):
    assert dict(probes.fetch(tmp_path, ("digits",))) == {"digits": "1438 train, 359 val"}
    images, in_memory = folder_images(tmp_path / "digits" / "val"), digit_images("heldout")
    assert list(images.labels) == list(in_memory.labels)
    assert all(images.open(i).tobytes() == in_memory.open(i).tobytes() for i in range(359))


def test_fashion_mnist_in_imagenet_layout(tmp_path):
    source = tmp_path / "package"
    root = source / "usr/share/datasets/fashion-mnist"
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = {split: rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) for split, count in (("train", 20), ("t10k", 10))}
    for split, images in pictures.items():
        with gzip.open(root / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + images.tobytes())
        with gzip.open(root / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + bytes(i % 10 for i in range(len(images))))
    probes.fashion_mnist({"dataset-fashion-mnist": source}, tmp_path / "built")
    train = folder_images(tmp_path / "built" / "train")
    assert train.num_classes == 10 and len(train.labels) == 20
    assert np.array_equal(np.array(Image.open(tmp_path / "built/val/Sandal/00005.png")), pictures["t10k"][5])


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """Ten captions in each of two categories, two stamps per caption: a disc on nothing."""
    source = tmp_path_factory.mktemp("package")
    for category in ("animals", "food", "symbols"):
        folder = source / "usr/share/tuxpaint/stamps" / category
        folder.mkdir(parents=True)
        for number in range(20):
            stamp = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
            ImageDraw.Draw(stamp).ellipse((4, 4, 34, 26), fill=(number * 10, 200, 30, 255))
            stamp.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"{category} {number // 2}\nde.utf8=...\n")
    Image.new("RGBA", (40, 30), "red").save(source / "usr/share/tuxpaint/stamps/food/0.png")  # nothing is cut out
    return {"tuxpaint-stamps-default": source}


def test_stamps_are_held_out_by_caption(stamps):
    split = probes.split_stamps(stamps)
    animals, food = (probes.STAMP_CLASSES.index(name) for name in ("animals", "food"))
    assert [len(split[s][animals]) for s in probes.SPLITS] == [16, 4]
    assert sum(len(split[s][food]) for s in probes.SPLITS) == 19
    colours = {
        s: {stamp.getpixel((stamp.width // 2, stamp.height // 2))[0] // 20 for stamp in split[s][animals]} for s in split
    }
    assert not colours["training"] & colours["validation"]  # no caption on both sides


def test_captions_of_the_stamps_of_validation_are_not_learned(stamps, tmp_path):
    """By the recipe smollm2, whose encoders the probe is to measure as well; what it holds out beside them is a tenth."""
    (tmp_path / "stamps").mkdir()
    captions = {"train": set(), "heldout": set()}
    for split, record in build.stamps(stamps, tmp_path):
        captions[split].add(record["conversations"][1]["value"])
    assert len(captions["train"]) + len(captions["heldout"]) == 20 and not captions["train"] & captions["heldout"]
    pasted = held_out_captions(cut_outs(stamps))
    assert len(pasted) == 4 and pasted <= captions["heldout"]
    assert captions["heldout"] == pasted | {c for found in captions.values() for c in found if split_of(c) == "heldout"}


def test_composites_carry_their_masks(stamps):
    split = [group or [Image.new("RGBA", (20, 20), (0, 0, 255, 255))] for group in probes.split_stamps(stamps)["training"]]
    seen = set()
    for number in range(20):
        page = Image.new("RGB", (120, 97), "white")
        image, annotation = probes.composite(np.random.default_rng(number), page, split)
        pixels, values = np.array(image).astype(int), np.array(annotation)
        assert image.size == annotation.size == (120, 97)
        seen |= set(values.flat)
        assert (pixels[values == probes.PAGE].min(-1) > 180).all()  # paper, but for the faintest edge
        assert (pixels[values > probes.PAGE].min(-1) < 100).all()
    assert seen == set(range(2 + len(probes.STAMP_CLASSES)))


def test_stamp_segmentation_in_ade20k_layout(stamps, tmp_path, monkeypatch):
    class Cutter:
        def __init__(self, places, split):
            pass

        def __enter__(self):
            return lambda rng: Image.new("RGB", (101, 99), "white")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(probes, "PageCutter", Cutter)
    monkeypatch.setattr(probes, "COMPOSITES", {"training": 3, "validation": 2})
    monkeypatch.setattr(probes, "STAMP_CLASSES", ("animals", "food"))
    probes.stamp_segmentation(stamps, tmp_path)
    train = annotated_folder(tmp_path, "training")
    assert list(train.classes) == ["page", "animals", "food"] and len(train.pairs) == 3
    for index in range(3):
        picture, annotation = train.open(index)
        assert picture.size == (101, 99) and train.labels(annotation).max() > 0


def test_a_part_that_cannot_be_had_is_left_out(tmp_path, monkeypatch, capsys):
    place = tmp_path / "archives" / "dataset-fashion-mnist"
    place.mkdir(parents=True)
    (place / "dataset-fashion-mnist.deb").write_text("not what the manifest names")
    monkeypatch.setattr(sys, "argv", ["probes", str(tmp_path), "--only", "fashion-mnist"])
    assert probes.main() == 1
    assert "left out" in (said := capsys.readouterr().out) and "SHA-256" in said
    assert not (tmp_path / "fashion-mnist").exists()

    def builder(places, folder):
        raise ModuleNotFoundError("No module named 'pypdfium2'")

    monkeypatch.setitem(probes.BUILDERS, "digits", builder)
    assert "pip install 'comp-kernels[data]'" in dict(probes.fetch(tmp_path, ("digits",)))["digits"]
