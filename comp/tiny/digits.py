"""Pages of handwriting: number strips, columns, forms and grids composed from scikit-learn's scans of handwritten digits.

The 1,797 scans are split once, image by image: a scan that appears on a held-out page appears on no training page.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from .scenes import ORDINALS, Drawing, Mark, Question, Scene, font, new_seed

INKS = ((25, 25, 30), (20, 40, 120), (70, 30, 20))
ROW_NAMES = "ABCD"
HELD_OUT_SHARE = 0.2
SPLIT_SEED = 1998  # year of the scans' publication; changing it changes the held-out set


@lru_cache
def load_scans(split: str) -> dict[int, list[Image.Image]]:
    """Scans by digit, 8x8 greyscale masks (255 = full ink). split: "train" (1,438 scans) or "heldout" (359)."""
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    scans = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(scans.target))
    num_heldout = int(HELD_OUT_SHARE * len(order))
    chosen = order[:num_heldout] if split == "heldout" else order[num_heldout:]
    by_digit: dict[int, list[Image.Image]] = {digit: [] for digit in range(10)}
    for index in sorted(chosen):
        mask = np.round(scans.images[index] * (255 / 16)).astype(np.uint8)
        by_digit[int(scans.target[index])].append(Image.fromarray(mask))
    return by_digit


class Page:
    """A sheet of off-white paper with one ink, on which digits are written and remembered as marks."""

    def __init__(self, rng: np.random.Generator, split: str, width: int, height: int):
        self.rng, self.scans = rng, load_scans(split)
        paper = int(rng.integers(232, 256))
        self.ink = INKS[rng.integers(len(INKS))]
        self.image = Image.new("RGB", (width, height), (paper, paper, paper - int(rng.integers(0, 12))))
        self.draw = ImageDraw.Draw(self.image)
        self.marks: list[Mark] = []

    def write(self, digit: int, x: float, y: float, size: int, line: int) -> None:
        """Paste a random scan of the digit, centred at (x, y), slightly turned."""
        options = self.scans[digit]
        scan = options[self.rng.integers(len(options))].resize((size, size), Image.Resampling.BICUBIC)
        scan = scan.rotate(self.rng.uniform(-8, 8), Image.Resampling.BILINEAR)
        self.image.paste(self.ink, (round(x - size / 2), round(y - size / 2)), scan)
        self.marks.append(Mark(str(digit), x, y, line))


def number_strip(rng: np.random.Generator, split: str, max_digits: int = 6) -> Scene:
    """One number of 2 or more digits, written from left to right or, in a third of the pages, from top to bottom."""
    digits = [int(d) for d in rng.integers(0, 10, size=rng.integers(2, max_digits + 1))]
    text = "".join(map(str, digits))
    return Scene(text, _strip_questions(rng, digits), partial(_draw_strip, new_seed(rng), split, digits))


def _draw_strip(seed: int, split: str, digits: list[int]) -> Drawing:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(16, 29))
    pitch = max(size + int(rng.integers(-1, 7)), 17)
    margin, across = int(rng.integers(3, 12)), size + int(rng.integers(4, 20))
    along = 2 * margin + pitch * len(digits)
    vertical = rng.random() < 1 / 3
    page = Page(rng, split, *((across, along) if vertical else (along, across)))
    if rng.random() < 0.5:  # a ruled sheet
        for height in range(int(rng.integers(6, 12)), page.image.height, int(rng.integers(10, 16))):
            page.draw.line((0, height, page.image.width, height), fill=(205, 215, 230))
    for i, digit in enumerate(digits):
        a, b = margin + pitch * (i + 0.5), across / 2 + rng.uniform(-2, 2)
        x, y, line = (b, a, i) if vertical else (a, b, 0)
        page.write(digit, x, y, size, line)
    return Drawing(page.image, tuple(page.marks))


def _strip_questions(rng: np.random.Generator, digits: list[int]) -> tuple[Question, ...]:
    position = int(rng.integers(len(digits)))
    questions = [
        Question("number", "What number is written?", "".join(map(str, digits))),
        Question("position", f"Which digit is {ORDINALS[position]}?", str(digits[position])),
        Question("count", "How many digits are there?", str(len(digits))),
        Question("largest", "What is the largest digit?", str(max(digits))),
        Question("smallest", "What is the smallest digit?", str(min(digits))),
    ]
    if len(digits) <= 3:
        questions.append(Question("sum", "What is the sum of the digits?", str(sum(digits))))
    return tuple(questions)


def form(rng: np.random.Generator, split: str) -> Scene:
    """A form of 2 to 4 boxes with printed names, a number of 1 to 3 digits written in each."""
    numbers = rng.choice(np.arange(1, 1000), p=_even_lengths(), size=rng.integers(2, 5), replace=False).tolist()
    text = "\n".join(f"{ROW_NAMES[i]}{number}" for i, number in enumerate(numbers))
    return Scene(text, _form_questions(rng, numbers), partial(_draw_form, new_seed(rng), split, numbers))


def _draw_form(seed: int, split: str, numbers: list[int]) -> Drawing:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(16, 25))
    height, pitch = size + int(rng.integers(5, 11)), max(size + int(rng.integers(-1, 4)), 17)
    left, margin = int(rng.integers(22, 29)), int(rng.integers(4, 10))
    width = left + pitch * max(len(str(n)) for n in numbers) + margin + 4
    page = Page(rng, split, width, 2 * margin + height * len(numbers))
    for i, number in enumerate(numbers):
        top = margin + height * i
        page.draw.rectangle((left - 2, top, width - margin, top + height - 2), outline=(150, 150, 150))
        page.draw.text((left / 2, top + height / 2), ROW_NAMES[i], fill=(0, 0, 0), font=font(16), anchor="mm")
        page.marks.append(Mark(ROW_NAMES[i], left / 2, top + height / 2, i))
        for j, digit in enumerate(str(number)):
            page.write(int(digit), left + pitch * (j + 0.5), top + height / 2 + rng.uniform(-2, 2), size, i)
    return Drawing(page.image, tuple(page.marks))


@lru_cache
def _even_lengths() -> np.ndarray:
    """Probabilities of 1 to 999 that make one, two and three digits equally likely."""
    lengths = np.array([len(str(n)) for n in range(1, 1000)])
    weights = 1 / np.bincount(lengths)[lengths]
    return weights / weights.sum()


def _form_questions(rng: np.random.Generator, numbers: list[int]) -> tuple[Question, ...]:
    row = int(rng.integers(len(numbers)))
    largest = int(np.argmax(numbers))
    return (
        Question("row", f"What number is in box {ROW_NAMES[row]}?", str(numbers[row])),
        Question("boxes", "How many boxes are there?", str(len(numbers))),
        Question("largest box", "Which box has the largest number?", ROW_NAMES[largest]),
    )


def grid(rng: np.random.Generator, split: str) -> Scene:
    """2 or 3 rows of 2 to 4 digits, no digit twice: what its questions ask for is told by its place alone."""
    rows = int(rng.integers(2, 4))
    columns = int(rng.integers(2, 5 if rows == 2 else 4))
    digits = rng.permutation(10)[: rows * columns].reshape(rows, columns).tolist()
    text = "\n".join("".join(map(str, row)) for row in digits)
    return Scene(text, _grid_questions(rng, digits), partial(_draw_grid, new_seed(rng), split, digits))


def _draw_grid(seed: int, split: str, digits: list[list[int]]) -> Drawing:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(16, 27))
    across, down = (max(size + int(rng.integers(0, 13)), 17) for _ in range(2))
    left, top, right, bottom = (int(margin) for margin in rng.integers(3, 16, size=4))
    page = Page(rng, split, left + across * len(digits[0]) + right, top + down * len(digits) + bottom)
    if rng.random() < 0.5:  # a table with lines
        for i in range(len(digits) + 1):
            page.draw.line((left, top + i * down, left + across * len(digits[0]), top + i * down), fill=(170, 170, 170))
        for j in range(len(digits[0]) + 1):
            page.draw.line((left + j * across, top, left + j * across, top + down * len(digits)), fill=(170, 170, 170))
    for i, row in enumerate(digits):
        for j, digit in enumerate(row):
            x, y = left + across * (j + 0.5) + rng.uniform(-1, 1), top + down * (i + 0.5) + rng.uniform(-1, 1)
            page.write(digit, x, y, size, i)
    return Drawing(page.image, tuple(page.marks))


def _grid_questions(rng: np.random.Generator, digits: list[list[int]]) -> tuple[Question, ...]:
    table = np.array(digits)
    rows, columns = table.shape
    i, j = int(rng.integers(rows)), int(rng.integers(columns))
    questions = [Question("cell", f"Which digit is in row {i + 1}, column {j + 1}?", str(table[i, j]))]
    for kind, names, cells in (("beside", ("left of", "right of"), table), ("above", ("above", "below"), table.T)):
        # of two neighbours along an axis one is named and the other asked for
        i, j = int(rng.integers(cells.shape[0])), int(rng.integers(cells.shape[1] - 1))
        side = int(rng.integers(2))
        asked, named = (cells[i, j + side], cells[i, j + 1 - side])
        questions.append(Question(kind, f"Which digit is {names[side]} the {named}?", str(asked)))
    return tuple(questions)
