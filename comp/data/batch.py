"""What the data gives to the model: one sample as read, one sample as token ids and patches, one padded and packed batch."""

from __future__ import annotations

import dataclasses
import io
import os.path
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IGNORED = -100
"""Label of a position that is not learned."""


def printable(text: object, longest: int = 80) -> str:
    """For messages: halves of characters, which JSON may hold and no terminal takes, as escapes."""
    return str(text)[:longest].encode("utf-8", "backslashreplace").decode()


class BadSampleError(ValueError):
    """Samples that cannot be used; the message starts with a name. Training skips and counts them, or stops, by policy."""

    def __init__(self, message: str):
        super().__init__(printable(message, longest=2000))


class FileInFolder(str):
    """A file name from a dataset that may not lead out of `folder`: ValueError here for names, in `check` for symbolic links.

    advice:  ends the messages.
    """

    name: str
    folder: Path
    advice: str

    def __new__(cls, name: str, folder: Path, advice: str = "") -> FileInFolder:
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise ValueError(f"{name} leads out of {folder}{advice}")
        self = super().__new__(cls, folder / name)
        self.name, self.folder, self.advice = name, folder, advice
        return self

    def __reduce__(self) -> tuple[type[FileInFolder], tuple[str, Path, str]]:
        return FileInFolder, (self.name, self.folder, self.advice)  # for workers that are spawned

    def check(self) -> None:
        """Reads the disk, so it is done when the file is opened."""
        if not Path(self).resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"leads out of {self.folder} by a symbolic link{self.advice}")


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image file in memory, opened when it is needed."""

    data: bytes

    def __call__(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.data))
        except UnidentifiedImageError as error:  # its own message names an address in memory
            raise ValueError(f"{len(self.data)} bytes in no image format that Pillow reads") from error


LazyImage = str | Image.Image | Callable[[], Image.Image]
"""A file name, a picture, or a function that makes one when it is needed."""


@dataclass(kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    text: str
    """Text without image markers."""
    images: list[LazyImage] = field(default_factory=list)
    """Images of this turn; they stand in front of its text."""
    learned: bool = True
    """False: an answer that is read and not learned. One without text never is."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One conversation about zero or more images; nothing is read from disk before it is needed."""

    name: str
    """How reports call this sample: file and index, or an id."""
    messages: list[Message]
    answers: list[str] = field(default_factory=list)
    """Accepted answers to the last question, for evaluation; empty: the text of the last assistant turn."""
    question_type: str = "all"
    """Evaluation reports one row per type."""
    metric: str | None = None
    """One of `comp.eval.metrics.METRICS` or `comp.eval.choices.CHOICE_METRICS`; None: the metric of the configuration."""
    text: str | None = None
    """What the image says as a whole, a caption or the words of a page: the text of the alignment loss and of the word prior.
    None: all answers, joined by a space."""
    options: list[str] = field(default_factory=list)
    """Texts of the options A, B, ... of a multiple-choice question, for metrics that need them."""
    group: str | None = None
    """Questions of one group are one question to the score, right only if all are: MMBench's circular evaluation."""
    notes: list[str] = field(default_factory=list)
    """What of the record is not read, each said once in a run."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """Samples of one forward pass: text padded on the right, patches of all images packed without padding."""

    input_ids: Tensor  # [B, L] int64, right padded
    attention_mask: Tensor  # [B, L] bool, False on padding
    labels: Tensor  # [B, L] int64, IGNORED = not learned; not shifted, the model shifts
    pixel_values: Tensor  # [N, C*P*P] float32, patches of all images in merge-block order
    grid_thw: Tensor  # [M, 3] int64, (frames, rows, columns) of patches of each image
    image_sample: Tensor  # [M] int64, row of input_ids the image belongs to, non-decreasing
    answer_ids: Tensor  # [B, La] int64, right padded: text of the alignment loss
    answer_mask: Tensor  # [B, La] bool
    names: list[str] = field(default_factory=list)  # B sample names, for messages

    def to(self, device: torch.device | str) -> Batch:
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def num_learned_tokens(self) -> int:
        """Tokens with a next-token loss: labels after the first position."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def num_learned_rows(self) -> int:
        """Samples with a next-token loss."""
        return int((self.labels[:, 1:] != IGNORED).any(1).sum())

    def aligned_rows(self) -> Tensor:
        """[B] bool: samples that enter the alignment loss, those with an image and a non-empty answer."""
        has_image = torch.zeros(len(self.input_ids), dtype=torch.bool, device=self.input_ids.device)
        has_image[self.image_sample] = True
        return has_image & self.answer_mask.any(1)

    def num_aligned_rows(self) -> int:
        return int(self.aligned_rows().sum())
