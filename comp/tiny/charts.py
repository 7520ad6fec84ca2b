"""Bar charts of real tables, drawn with Pillow; the answers come from the table and are exact.

The tables ship inside scikit-learn and matplotlib. They are split table by table: no number of a held-out chart comes from
a table that was seen in training. This is a drawing of real numbers with ChartQA-style questions, not ChartQA.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from sklearn import datasets

from .scenes import Drawing, Mark, Question, Scene, font, new_seed

COLOURS = {  # names and values of matplotlib's "tab10"
    "blue": (31, 119, 180),
    "orange": (255, 127, 14),
    "green": (44, 160, 44),
    "red": (214, 39, 40),
    "purple": (148, 103, 189),
    "pink": (227, 119, 194),
}
HELD_OUT_TABLES = ("wine", "linnerud")
LABEL_SIZE, SMALL = 16, 9  # font sizes in pixels: value labels; titles, ticks and names


@dataclass(frozen=True)
class Table:
    """values: [rows, columns], NaN where unknown; names of rows and columns."""

    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray


@lru_cache
def load_tables(split: str) -> tuple[Table, ...]:
    """Tables of a split: "train" or "heldout"."""
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    tables = [_stocks(), _sklearn_table("diabetes", datasets.load_diabetes(scaled=False))]
    tables += [
        _sklearn_table(name, getattr(datasets, f"load_{name}")()) for name in ("iris", "breast_cancer", "wine", "linnerud")
    ]
    return tuple(t for t in tables if (t.name in HELD_OUT_TABLES) == (split == "heldout"))


def _sklearn_table(name: str, bunch) -> Table:
    rows = tuple(str(i + 1) for i in range(len(bunch.data)))
    return Table(name, rows, tuple(bunch.feature_names), np.asarray(bunch.data, dtype=float))


def _stocks() -> Table:
    """Monthly closing prices since 1990, from matplotlib's sample data."""
    with open(Path(matplotlib.get_data_path()) / "sample_data/Stocks.csv") as f:
        header, *lines = csv.reader(line for line in f if not line.startswith("#"))
    lines = [line for line in lines if line]
    values = np.array([[float(cell) if cell else np.nan for cell in line[1:]] for line in lines])
    return Table("stocks", tuple(line[0][:4] for line in lines), tuple(header[1:]), values)


def bar_chart(rng: np.random.Generator, split: str) -> Scene:
    """3 to 5 rows of one column of a table, as vertical or horizontal bars with their values beside them."""
    title, names, numbers = _pick(rng, split, count=int(rng.integers(3, 6)))
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[: len(numbers)]]
    draw = _draw_vertical if rng.random() < 0.5 else _draw_horizontal
    text = "\n".join(f"{colour}{number}" for colour, number in zip(colours, numbers))
    return Scene(text, _questions(rng, numbers, colours), partial(draw, new_seed(rng), title, names, numbers, colours))


def _pick(rng: np.random.Generator, split: str, count: int) -> tuple[str, list[str], list[int]]:
    """A title, names of rows and their values, scaled by a power of ten so that the largest has two digits."""
    tables = load_tables(split)
    while True:
        table = tables[rng.integers(len(tables))]
        column = int(rng.integers(len(table.columns)))
        known = np.flatnonzero(table.values[:, column] > 0)
        if len(known) < count:
            continue
        rows = rng.choice(known, size=count, replace=False)
        values = table.values[rows, column]
        power = 1 - int(np.floor(np.log10(values.max())))
        numbers = [round(v * 10.0**power) for v in values]
        if len(set(numbers)) > 1 and 1 <= min(numbers) and max(numbers) <= 99:
            unit = f" (x 1e{-power})" if power else ""
            return table.columns[column] + unit, [table.rows[r] for r in rows], numbers


def _questions(rng: np.random.Generator, numbers: list[int], colours: list[str]) -> tuple[Question, ...]:
    bar = int(rng.integers(len(numbers)))
    questions = [
        Question("bar value", f"What is the value of the {colours[bar]} bar?", str(numbers[bar])),
        Question("bars", "How many bars are there?", str(len(numbers))),
    ]
    for kind, word, best in (("highest", "largest", max(numbers)), ("lowest", "smallest", min(numbers))):
        if numbers.count(best) == 1:
            questions.append(Question(kind, f"Which bar has the {word} value?", colours[numbers.index(best)]))
    return tuple(questions)


def _dark(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = colour
    return int(0.7 * red), int(0.7 * green), int(0.7 * blue)


def _ticks(longest: int) -> list[int]:
    step = next(s for s in (1, 2, 5, 10, 20, 25, 50) if longest / s <= 4)
    return list(range(0, longest + 1, step))


def _label_marks(text: str, x: float, y: float, line: int) -> list[Mark]:
    """One mark per character of a label centred at (x, y)."""
    pitch = font(LABEL_SIZE).getlength("0")
    return [Mark(c, x + pitch * (i - (len(text) - 1) / 2), y, line) for i, c in enumerate(text)]


def _draw_title(draw: ImageDraw.ImageDraw, title: str, width: int) -> None:
    while font(SMALL).getlength(title) > width - 4:
        title = title[:-2] + "…"
    draw.text((2, 1), title, fill=(60, 60, 60), font=font(SMALL))


def _draw_vertical(seed: int, title: str, names: list[str], numbers: list[int], colours: list[str]) -> Drawing:
    rng = np.random.default_rng(seed)
    pitch, plot = int(rng.integers(25, 33)), int(rng.integers(40, 64))
    left, top, bottom = 20, 34, 16
    width, height = left + pitch * len(numbers) + 6, top + plot + bottom
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    _draw_title(draw, title, width)
    base, scale = top + plot, plot / max(numbers)
    for tick in _ticks(max(numbers)):
        y = base - tick * scale
        draw.line((left, y, width - 4, y), fill=(225, 225, 225))
        draw.text((left - 3, y), str(tick), fill=(110, 110, 110), font=font(SMALL), anchor="rm")
    marks = []
    for i, (name, number, colour) in enumerate(zip(names, numbers, colours)):
        x, y, half = left + pitch * (i + 0.5), base - number * scale, 0.36 * pitch
        draw.rectangle((x - half, y, x + half, base), fill=COLOURS[colour])
        draw.text((x, y - 9), str(number), fill=_dark(COLOURS[colour]), font=font(LABEL_SIZE), anchor="mm")
        draw.text((x, base + 8), name[-4:], fill=(60, 60, 60), font=font(SMALL), anchor="mm")
        marks += [Mark(colour, x, min(y + 6, base - 1), i), *_label_marks(str(number), x, y - 9, i)]
    draw.line((left, top - 4, left, base), fill=(0, 0, 0))
    draw.line((left, base, width - 4, base), fill=(0, 0, 0))
    return Drawing(image, tuple(marks))


def _draw_horizontal(seed: int, title: str, names: list[str], numbers: list[int], colours: list[str]) -> Drawing:
    rng = np.random.default_rng(seed)
    pitch, plot = int(rng.integers(18, 25)), int(rng.integers(50, 90))
    left, top, right, bottom = 30, 16, 28, 16
    width, height = left + plot + right, top + pitch * len(numbers) + bottom
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    _draw_title(draw, title, width)
    base, scale = height - bottom, plot / max(numbers)
    for tick in _ticks(max(numbers)):
        x = left + tick * scale
        draw.line((x, top, x, base), fill=(225, 225, 225))
        draw.text((x, base + 8), str(tick), fill=(110, 110, 110), font=font(SMALL), anchor="mm")
    marks = []
    for i, (name, number, colour) in enumerate(zip(names, numbers, colours)):
        y, x, half = top + pitch * (i + 0.5), left + number * scale, 0.36 * pitch
        draw.rectangle((left, y - half, x, y + half), fill=COLOURS[colour])
        draw.text((x + 14, y), str(number), fill=_dark(COLOURS[colour]), font=font(LABEL_SIZE), anchor="mm")
        draw.text((left - 3, y), name[-4:], fill=(60, 60, 60), font=font(SMALL), anchor="rm")
        marks += [Mark(colour, max(x - 6, left + 1), y, i), *_label_marks(str(number), x + 14, y, i)]
    draw.line((left, top, left, base), fill=(0, 0, 0))
    draw.line((left, base, width - right, base), fill=(0, 0, 0))
    return Drawing(image, tuple(marks))
