"""Tux Paint's stamps out of the unpacked Debian package: pictures with a sentence each, cut out, and which are held out.

The recipe `smollm2` learns their captions (build.py), the segmentation probe pastes them on pages (probes.py). One split serves
both: no encoder that learned from captions is probed on the stamps that it has met.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image

from .packages import Places

STAMP_CLASSES = ("animals", "food", "plants", "seasonal", "town", "vehicles")
"""Categories of stamps with more than 30 pictures, but symbols and household, which have no look in common."""
HELD_OUT_SHARE = 0.2


def stamp_folder(places: Places) -> Path:
    return places["tuxpaint-stamps-default"] / "usr/share/tuxpaint/stamps"


def stamp_files(places: Places) -> Iterator[tuple[str, Path, str]]:
    """(category, picture, caption) of all stamps, mirror images and those without a caption left out."""
    root = stamp_folder(places)
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if text.is_file() and not path.stem.endswith("_mirror"):
            caption = text.read_text(encoding="utf-8").splitlines()[0].strip()
            if caption:
                yield path.relative_to(root).parts[0], path, caption


def cut_out(path: Path) -> Image.Image | None:
    """The picture without its transparent margin, at most 224 pixels a side; None when it is tiny or nothing is cut out."""
    stamp = Image.open(path).convert("RGBA")
    alpha = np.asarray(stamp)[..., 3]
    if min(alpha.shape) < 16 or (alpha < 64).mean() < 0.02 or (alpha > 191).mean() < 0.05:
        return None
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    stamp.thumbnail((224, 224))
    return stamp


def cut_outs(places: Places) -> list[dict[str, list[Image.Image]]]:
    """Stamps by caption, in the order of a hash, for each of STAMP_CLASSES. A caption that two share counts for the first."""
    by_class: list[dict[str, list[Image.Image]]] = [defaultdict(list) for _ in STAMP_CLASSES]
    class_of: dict[str, int] = {}
    for category, path, caption in stamp_files(places):
        stamp = cut_out(path) if category in STAMP_CLASSES else None
        if stamp is not None:
            by_class[class_of.setdefault(caption, STAMP_CLASSES.index(category))][caption].append(stamp)

    def place(caption: str) -> tuple[int, str]:
        return zlib.crc32(caption.encode()) % 10, caption

    return [{caption: by_caption[caption] for caption in sorted(by_caption, key=place)} for by_caption in by_class]


def held_out_captions(by_class: list[dict[str, list[Image.Image]]]) -> set[str]:
    """The first fifth of the captions of each class of `cut_outs`."""
    return {caption for captions in by_class for caption in list(captions)[: ceil(HELD_OUT_SHARE * len(captions))]}
