"""What a page is: the questions it answers, an image, and the marks on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageFont

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class Mark:
    """One character or one coloured thing. x, y: its centre in pixels; line: its line in reading order."""

    text: str
    x: float
    y: float
    line: int


@dataclass(frozen=True)
class Question:
    """kind names the skill that is asked for; answers are scored per kind."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Drawing:
    """A page and the marks on it, in reading order."""

    image: Image.Image
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Scene:
    """What a page will show is known at once; it is drawn when `draw` is called, every time the same.

    text: all marks of the page in reading order, its lines on lines of their own (a strip is one line, also from top to
    bottom).
    """

    text: str
    questions: tuple[Question, ...]
    draw: Callable[[], Drawing]


def new_seed(rng: np.random.Generator) -> int:
    """Seed of a generator that decides how a page looks, apart from what it says."""
    return int(rng.integers(2**63))


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which ships inside matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
