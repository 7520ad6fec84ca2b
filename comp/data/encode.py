"""A sample as read -> token ids and patches at the resolution of a stage. Unusable samples raise BadSampleError by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..config import MAX_PIXELS, MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS, ConfigError
from ..files import is_lfs_pointer
from ..limits import NO_LIMIT, count_positions
from .batch import IGNORED, BadSampleError, FileInFolder, ImageBytes, LazyImage, Message, Sample
from .decode import to_rgb
from .images import pad_to_square, prepare_image, sides
from .packing import EncodedSample
from .template import ChatTemplate

BYTES_PER_TOKEN = 4  # of English text, for estimates


@dataclass(kw_only=True, frozen=True, slots=True)
class ImageSettings:
    """How images become patches of one vision tower in one stage."""

    patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resolution: int | None = None
    """Side of square images in pixels; None: native size and aspect ratio."""
    min_visual_tokens: int = MIN_VISUAL_TOKENS
    max_visual_tokens: int = MAX_VISUAL_TOKENS
    """Of one sample; its images share it evenly."""
    max_image_pixels: int = MAX_PIXELS
    """Larger files are not decoded."""
    pad_to_square: bool = False
    """Pad to a square before the resize to `resolution`."""

    def __post_init__(self) -> None:
        if self.tokens_per_image() > self.max_visual_tokens:
            raise ConfigError(
                f"resolution {self.resolution} gives {self.tokens_per_image()} visual tokens per image, "
                f"max_visual_tokens allows {self.max_visual_tokens}"
            )

    def tokens_per_image(self) -> int:
        """Visual tokens of a square image, its side rounded to patch_size * merge_size pixels; at native size the fewest."""
        if self.resolution is None:
            return 1
        return max(1, round(self.resolution / (self.patch_size * self.merge_size))) ** 2


class SampleEncoder:
    """Encodes samples for training and, with `encode_prompt`, for generation.

    max_positions:  of the language model, counted as its decoder counts them: with `mrope` an image takes as many as its
                    longest side has visual tokens, without it every token takes one.
    answer_tokens:  positions that a prompt leaves to its answer.
    shuffle_answers, max_alignment_tokens:  of the text of the alignment loss (comp.config.AlignmentConfig).
    """

    def __init__(
        self,
        template: ChatTemplate,
        images: ImageSettings,
        *,
        max_text_tokens: int,
        max_positions: int = NO_LIMIT,
        mrope: bool = False,
        answer_tokens: int = 0,
        shuffle_answers: bool = False,
        max_alignment_tokens: int | None = None,
    ):
        self.template = template
        self.images = images
        self.max_text_tokens = max_text_tokens
        self.max_positions = max_positions
        self.mrope = mrope
        self.answer_tokens = answer_tokens
        self.shuffle_answers = shuffle_answers
        self.max_alignment_tokens = min(max_alignment_tokens or NO_LIMIT, max_positions - len(template.start))

    @property
    def patch_features(self) -> int:
        """Values per patch, C * P * P."""
        return 3 * self.images.patch_size**2

    def encode(self, sample: Sample, seed: Sequence[int] = ()) -> EncodedSample:
        """seed:  numbers that decide the order of the answers in the alignment text, where they are shuffled."""
        patches, grids, counts = self._encode_images(sample, sample.messages)
        ids, labels = self.template.encode(sample.messages, counts)
        if all(label == IGNORED for label in labels):
            raise BadSampleError(f"{sample.name}: no answer is learned, by its `learned` or for lack of text")
        return self._checked(sample, ids, labels, self._alignment_ids(sample, seed), patches, grids, counts)

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """The conversation up to the last answer, ready to be continued."""
        messages = prompt_messages(sample)
        patches, grids, counts = self._encode_images(sample, messages)
        ids = self.template.encode_prompt(messages, counts)
        return self._checked(sample, ids, [], [], patches, grids, counts, answer_tokens=self.answer_tokens)

    def estimate(self, sample: Sample) -> tuple[int, list[int]]:
        """About (tokens of text without the visual ones, patches of each image), without reading pixels or tokenizing.

        Images that are made on demand count as none; what cannot be read counts as none too, here and nowhere else.
        """
        settings = self.images
        factor = settings.patch_size * settings.merge_size
        lazy = [image for message in sample.messages for image in message.images]
        share = settings.max_visual_tokens // max(1, len(lazy))
        fixed = None if settings.resolution is None else (settings.resolution, settings.resolution)
        patches = []
        for image in lazy:
            width, height = image_size(image)
            if width and height and share:
                limits = dict(min_tokens=min(settings.min_visual_tokens, share), max_tokens=share)
                height, width = sides(height, width, factor=factor, **limits, size=fixed)
                patches.append(height * width // settings.patch_size**2)
        return sum(len(m.text.encode("utf-8", "replace")) for m in sample.messages) // BYTES_PER_TOKEN, patches

    def _alignment_ids(self, sample: Sample, seed: Sequence[int]) -> list[int]:
        rng = np.random.default_rng(list(seed)) if self.shuffle_answers else None
        return self.template.encode_text(self.template.alignment_text(sample, rng))[: self.max_alignment_tokens]

    def _checked(
        self,
        sample: Sample,
        ids: list[int],
        labels: list[int],
        answer_ids: list[int],
        patches: list[Tensor],
        grids: list[tuple[int, int, int]],
        counts: list[int],
        answer_tokens: int = 0,
    ) -> EncodedSample:
        if len(ids) > self.max_text_tokens:
            raise BadSampleError(
                f"{sample.name}: {len(ids)} tokens ({sum(counts)} of them visual) exceed max_text_tokens {self.max_text_tokens}"
            )
        merge = self.images.merge_size
        token_grids = [(t, h // merge, w // merge) for t, h, w in grids] if self.mrope else []
        positions = count_positions(len(ids), token_grids)
        if positions + answer_tokens > self.max_positions:
            answer = f" and {answer_tokens} of an answer" if answer_tokens else ""
            raise BadSampleError(
                f"{sample.name}: {positions} positions{answer} exceed the {self.max_positions} of the language model"
            )
        return EncodedSample(
            name=sample.name,
            input_ids=ids,
            labels=labels,
            answer_ids=answer_ids,
            patches=patches,
            grids=grids,
            num_visual_tokens=sum(counts),
        )

    def _encode_images(
        self, sample: Sample, messages: Sequence[Message]
    ) -> tuple[list[Tensor], list[tuple[int, int, int]], list[int]]:
        """Patches, grid and visual tokens of every image, in order."""
        lazy = [image for message in messages for image in message.images]
        if not lazy:
            return [], [], []
        settings = self.images
        share = settings.max_visual_tokens // len(lazy)
        needed = settings.tokens_per_image()
        if share < needed:
            raise BadSampleError(
                f"{sample.name}: {len(lazy)} images of at least {needed} visual tokens exceed "
                f"max_visual_tokens {settings.max_visual_tokens}"
            )
        patches, grids = [], []
        for image in lazy:
            loaded = load_image(image, sample.name, settings.max_image_pixels)
            pixels, grid = prepare_image(
                pad_to_square(loaded, settings.mean) if settings.pad_to_square else loaded,
                patch_size=settings.patch_size,
                merge_size=settings.merge_size,
                mean=settings.mean,
                std=settings.std,
                min_tokens=min(settings.min_visual_tokens, share),
                max_tokens=share,
                size=None if settings.resolution is None else (settings.resolution, settings.resolution),
            )
            patches.append(pixels)
            grids.append(grid)
        return patches, grids, [t * h * w // settings.merge_size**2 for t, h, w in grids]


def prompt_messages(sample: Sample) -> list[Message]:
    """The turns before the last answer."""
    messages = sample.messages
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def reference_answers(sample: Sample) -> list[str]:
    """The accepted answers of a sample for evaluation."""
    if sample.answers:
        return sample.answers
    if not sample.messages or sample.messages[-1].role != "assistant":
        raise BadSampleError(f"{sample.name}: no answers, and the last turn is not the assistant's")
    return [sample.messages[-1].text]


def open_file(name: str) -> Image.Image:
    """Raises for what must not be opened, and what Image.open raises."""
    if isinstance(name, FileInFolder):
        name.check()
    if Path(name).is_fifo():
        raise ValueError("a named pipe, which would be waited for; an image must be a file")
    return Image.open(name)


def image_size(image: LazyImage) -> tuple[int, int]:
    """(width, height) by the header of a file; (0, 0) for what is made on demand or cannot be opened."""
    if isinstance(image, Image.Image):
        return image.size
    if not isinstance(image, (str, ImageBytes)):
        return 0, 0
    try:
        with open_file(image) if isinstance(image, str) else image() as opened:
            return opened.size
    except Exception:  # the sample is named when it is read
        return 0, 0


def load_image(image: LazyImage, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read or make an RGB picture completely, so that damage shows here; `name` is for the message."""
    try:
        if isinstance(image, str):
            with open_file(image) as opened:
                return to_rgb(opened, max_pixels=max_pixels)
        return to_rgb(image() if callable(image) else image, max_pixels=max_pixels)
    except Exception as error:  # decoders raise nearly anything on damaged files
        where = image if isinstance(image, str) else "(made on demand)"
        if isinstance(error, UnidentifiedImageError) and isinstance(image, str) and is_lfs_pointer(Path(image)):
            raise BadSampleError(f"{name}: image {where} is a pointer of git-lfs; `git lfs pull` fetches the file") from error
        raise BadSampleError(f"{name}: image {where}: {type(error).__name__}: {error}") from error
