"""What a drawn page is: an image, the marks on it, and the questions that its marks answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
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
class Scene:
    """A drawn page with everything that is known about it."""

    image: Image.Image
    marks: tuple[Mark, ...]
    questions: tuple[Question, ...]


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which ships inside matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
