"""Pictures with a class per pixel, in ADE20K's layout, and random squares of them for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ...config import ConfigError
from ...data.batch import IGNORED, BadSampleError
from ...data.encode import load_image
from ..probes.frozen import IMAGE_ENDINGS, subset


@dataclass(frozen=True)
class AnnotatedImages:
    """Pairs of picture and annotation files; 0 in an annotation is ignored, k is class k - 1."""

    pairs: Sequence[tuple[Path, Path]]
    classes: Sequence[str]

    def open(self, index: int) -> tuple[Image.Image, Image.Image]:
        """RGB picture and annotation of the same size, values as stored."""
        image_file, annotation_file = self.pairs[index]
        image = load_image(str(image_file), "a probe")
        try:
            annotation = Image.open(annotation_file)
            annotation.load()
        except OSError as error:
            raise BadSampleError(f"a probe: annotation {annotation_file}: {error}") from error
        if annotation.mode not in ("L", "P"):
            raise ConfigError(f"{annotation_file} must hold one byte per pixel, the class, got mode {annotation.mode}")
        if annotation.size != image.size:
            raise ConfigError(f"{annotation_file} is {annotation.size} pixels, its picture {image_file} is {image.size}")
        return image, annotation

    def labels(self, annotation: Image.Image) -> Tensor:
        """[H, W] int64: class, or IGNORED."""
        values = torch.from_numpy(np.array(annotation)).long()
        if values.max() > len(self.classes):
            raise ConfigError(f"an annotation holds the value {values.max()}, but there are {len(self.classes)} classes")
        return torch.where(values == 0, IGNORED, values - 1)

    def first(self, count: int | None) -> AnnotatedImages:
        """`count` of the pictures, drawn from all of them."""
        return AnnotatedImages(subset(self.pairs, count), self.classes)


def annotated_folder(folder: Path, split: str, num_classes: int | None = None) -> AnnotatedImages:
    """The `split` ("training" or "validation") of a folder in ADE20K's layout.

    num_classes:  where the folder has no classes.txt with one name per line.
    """
    names = folder / "classes.txt"
    if num_classes is not None:
        classes = [str(number) for number in range(1, num_classes + 1)]
    elif names.is_file():
        classes = names.read_text(encoding="utf-8").rstrip().splitlines()
    else:
        raise ConfigError(f"{names} does not exist: say --num-classes (150 for the scene parsing benchmark of ADE20K)")
    images, annotations = folder / "images" / split, folder / "annotations" / split
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not found:
        raise ConfigError(f"{images} must hold pictures ({', '.join(IMAGE_ENDINGS)}), got none")
    pairs = [(path, annotations / path.relative_to(images).with_suffix(".png")) for path in found]
    missing = [annotation for _, annotation in pairs if not annotation.is_file()]
    if missing:
        raise ConfigError(f"{len(missing)} of {len(pairs)} pictures in {images} have no annotation, the first is {missing[0]}")
    return AnnotatedImages(pairs, classes)


def augmented_square(image: Image.Image, annotation: Image.Image, side: int) -> tuple[Image.Image, Image.Image]:
    """A square of `side` pixels out of the picture at 0.5 to 2 times its size, black and ignored where it is smaller; flipped
    half of the time; brightness, contrast and saturation each changed by up to a half."""

    def uniform(low: float, high: float) -> float:
        return float(torch.empty(()).uniform_(low, high))

    scale = uniform(0.5, 2.0)
    size = [max(1, round(extent * scale)) for extent in image.size]
    left, top = (int(torch.randint(max(0, extent - side) + 1, ())) for extent in size)
    box = (left, top, left + side, top + side)
    image = image.resize(size, Image.Resampling.BICUBIC).crop(box)  # what lies outside is 0
    annotation = annotation.resize(size, Image.Resampling.NEAREST).crop(box)
    if uniform(0, 1) < 0.5:
        image, annotation = ImageOps.mirror(image), ImageOps.mirror(annotation)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(uniform(0.5, 1.5))
    return image, annotation
