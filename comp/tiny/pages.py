"""The data of the default recipe: handwriting and bar charts with questions in words, made from a seed and an index.

A page is composed when it is asked for and drawn when it is looked at; the same (split, seed, index) gives the same page on
every machine. Training samples are conversations of several questions about one page; held-out samples ask one question,
every kind equally often.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..data.batch import Message, Sample
from .charts import COLOURS, bar_chart
from .digits import ROW_NAMES, form, grid, number_strip
from .scenes import Drawing, Question, Scene

SCENES: tuple[Callable[[np.random.Generator, str], Scene], ...] = (number_strip, form, grid, bar_chart)
SCENE_SHARES = (0.4, 0.2, 0.2, 0.2)
KINDS = {  # kind of question: (the page it needs, the metric of its answers)
    "number": (number_strip, "exact_match"),
    "position": (number_strip, "exact_match"),
    "count": (number_strip, "exact_match"),
    "largest": (number_strip, "exact_match"),
    "smallest": (number_strip, "exact_match"),
    "sum": (number_strip, "exact_match"),
    "row": (form, "exact_match"),
    "boxes": (form, "exact_match"),
    "largest box": (form, "exact_match"),
    "cell": (grid, "exact_match"),
    "beside": (grid, "exact_match"),
    "above": (grid, "exact_match"),
    "bar value": (bar_chart, "relaxed_accuracy"),
    "bars": (bar_chart, "exact_match"),
    "highest": (bar_chart, "exact_match"),
    "lowest": (bar_chart, "exact_match"),
}
MARKS = (*"0123456789", *ROW_NAMES, *COLOURS)
"""Every text that a mark can have: what there is to see on a page."""
MAX_TURNS = 4
TRANSCRIPT = "What is written?"
"""The question for the whole text of a page."""


class TinyPages:
    """`size` samples of a split ("train" or "heldout").

    transcript: ask training pages for their whole text in the last turn, and let it be the text of the alignment loss.
    """

    def __init__(self, split: str, size: int, seed: int = 0, transcript: bool = False):
        if split not in ("train", "heldout"):
            raise ValueError(f'split must be "train" or "heldout", got {split!r}')
        self.split, self.size, self.seed, self.transcript = split, size, seed, transcript

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in [0, {self.size}), got {index}")
        rng = np.random.default_rng([self.seed, self.split == "heldout", index])
        if self.split == "train":
            return _conversation(f"tiny/{self.split}/{index}", random_scene(rng, self.split), rng, self.transcript)
        kind = list(KINDS)[index % len(KINDS)]
        scene, question = _scene_with(rng, self.split, kind)
        return _sample(f"tiny/{self.split}/{index}", scene, [question])


class ShortStrips:
    """`size` training strips of two or three digits with their questions: the easy data that adapters start on, as captions
    come before documents. Squeezed into a small square they stay readable. transcript: see `TinyPages`."""

    def __init__(self, size: int, seed: int = 0, transcript: bool = False):
        self.size, self.seed, self.transcript = size, seed, transcript

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in [0, {self.size}), got {index}")
        rng = np.random.default_rng([self.seed, index])
        return _conversation(f"tiny/short/{index}", number_strip(rng, "train", max_digits=3), rng, self.transcript)


def random_scene(rng: np.random.Generator, split: str) -> Scene:
    """A page of a random sort."""
    return SCENES[rng.choice(len(SCENES), p=SCENE_SHARES)](rng, split)


def mark_labels(drawing: Drawing, rows: int, columns: int) -> np.ndarray:
    """[rows, columns, MARKS] float32: which marks have their centre in which cell of a grid over the page."""
    labels = np.zeros((rows, columns, len(MARKS)), np.float32)
    for mark in drawing.marks:
        row, column = int(mark.y / drawing.image.height * rows), int(mark.x / drawing.image.width * columns)
        if 0 <= row < rows and 0 <= column < columns:
            labels[row, column, MARKS.index(mark.text)] = 1
    return labels


def _scene_with(rng: np.random.Generator, split: str, kind: str) -> tuple[Scene, Question]:
    """A page of which this kind of question can be asked, and the question."""
    make_scene, _ = KINDS[kind]
    while True:
        scene = make_scene(rng, split)
        for question in scene.questions:
            if question.kind == kind:
                return scene, question


def _conversation(name: str, scene: Scene, rng: np.random.Generator, transcript: bool) -> Sample:
    """Some of the questions about a page, in random order; then, if asked for, its transcript, which no answer may lean on."""
    questions = [scene.questions[i] for i in rng.permutation(len(scene.questions))[: MAX_TURNS - transcript]]
    if not transcript:
        return _sample(name, scene, questions)
    sample = _sample(name, scene, [*questions, Question("transcript", TRANSCRIPT, scene.text)])
    sample.text = scene.text
    return sample


def _sample(name: str, scene: Scene, questions: list[Question]) -> Sample:
    messages = []
    for question in questions:
        messages += [Message(role="user", text=question.text), Message(role="assistant", text=question.answer)]
    messages[0].images.append(lambda: scene.draw().image)
    last = questions[-1]
    _, metric = KINDS.get(last.kind, (None, "exact_match"))
    return Sample(name=name, messages=messages, answers=[last.answer], question_type=last.kind, metric=metric)
