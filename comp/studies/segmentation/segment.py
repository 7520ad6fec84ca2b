"""Frozen segmentation: `python -m comp.studies.segmentation RUN --data FOLDER` trains heads on a run's encoders.

The encoder does not change (CoMP, arXiv 2503.18931, Table 3b). Data: a folder in ADE20K's layout, with pictures in
images/{training,validation} and a PNG of the same name for each in annotations/{training,validation}, whose value 0 is to be
ignored and 1 is the first class; names of the classes in classes.txt, or their number as --num-classes.

Validation pictures are encoded whole, at native resolution, packed. Heads train on squares cut out of the feature maps of whole
training pictures, which are computed once; with --augment on scaled, flipped and recoloured squares of the pictures instead, as
the paper does. The paper names neither the layers nor the pyramid: here four evenly spaced layers, each normalised, go to
transformers' UperNet head without its auxiliary head, or to a linear one. Writes RUN/probes/NAME/table.json and examples.png,
which the report page shows.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...cli import positive_int
from ...config import ConfigError
from ...data.batch import IGNORED
from ...data.images import to_raster
from ...eval.batches import in_batches
from ...model import VisionEncoder
from ...runs import encoders_of
from ..probes.frozen import (
    Measure,
    Trial,
    add_options,
    data_key,
    describe_table,
    fit,
    run_trial,
    settings_from,
)
from .data import AnnotatedImages, annotated_folder, augmented_square
from .heads import make_head

NUM_EXAMPLES = 4
MOST_CLASSES_SHOWN = 12


@dataclass(frozen=True)
class SegmentationSettings:
    """The paper's values in brackets, for ADE20K at 504 pixels (Table 14)."""

    head: str = field(default="upernet", metadata={"choices": ("upernet", "linear")})
    channels: int = 32  # of UperNet inside [not said; 512 in the original]
    crop: int = 96
    """Side of the squares that are trained on, in pixels [504 / 672]."""
    max_tokens: int = 3000
    """Larger pictures are scaled down, keeping the aspect ratio; h * w / merge_size^2."""
    iterations: int = 400  # [80,000]
    warmup: int = field(default=20, metadata={"least": 0})  # [1,500]
    batch_size: int = field(default=16, metadata={"least": 2})  # [16]; UperNet normalises one pooled value per picture
    lr: float = 1e-3  # [4e-5]
    min_lr: float = field(default=0.0, metadata={"least": 0})  # [0]
    weight_decay: float = field(default=0.05, metadata={"least": 0})  # [0.05]
    augment: bool = field(
        default=False, metadata={"help": "scale (0.5 to 2), flip and recolour training pictures, as the paper does"}
    )


# --- features ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def feature_maps(encoder: VisionEncoder, images: Sequence[Image.Image], max_tokens: int = 3000) -> list[Tensor]:
    """[4, D, h, w] per picture at native resolution, packed: four evenly spaced layers, each patch normalised as LayerNorm does
    without weights."""
    num_layers, merge_size = len(encoder.blocks), encoder.config.merge_size
    layers = [max(0, (number * num_layers) // 4 - 1) for number in (1, 2, 3, 4)]
    prepared = [encoder.prepare(image, max_tokens=max_tokens) for image in images]
    pixel_values = torch.cat([patches for patches, _ in prepared]).to(encoder.patch_embed.weight.device)
    grids = [grid for _, grid in prepared]
    _, taps = encoder(pixel_values, torch.tensor(grids), return_layers=layers)
    stacked = torch.stack([F.layer_norm(taps[layer], taps[layer].shape[-1:]) for layer in layers], dim=1)  # [N, 4, D]
    maps = to_raster(stacked.flatten(1), grids, merge_size)
    return [one.squeeze(0).unflatten(-1, stacked.shape[1:]).permute(2, 3, 0, 1) for one in maps]


# --- training ----------------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]  # maps [4, B, D, h, w] and labels [B, H, W]


class CachedCrops:
    """Squares out of the feature maps of whole pictures, which are computed once and kept in main memory."""

    def __init__(self, encoder: VisionEncoder, images: AnnotatedImages, settings: SegmentationSettings):
        self.patch_size = encoder.config.patch_size
        self.side = settings.crop // self.patch_size
        self.maps: list[Tensor] = []
        self.labels: list[Tensor] = []
        for batch in in_batches(len(images.pairs), settings.batch_size):
            opened = [images.open(i) for i in batch]
            maps = feature_maps(encoder, [image for image, _ in opened], settings.max_tokens)
            self.maps += [one.cpu() for one in maps]
            for (_, annotation), one in zip(opened, maps):
                size = [side * self.patch_size for side in (one.shape[3], one.shape[2])]  # width, height
                self.labels.append(images.labels(annotation.resize(size, Image.Resampling.NEAREST)).to(torch.int16))

    def __call__(self, chosen: Sequence[int]) -> Batch:
        cut = [self._square(self.maps[i], self.labels[i]) for i in chosen]
        return torch.stack([maps for maps, _ in cut], dim=1), torch.stack([labels for _, labels in cut]).long()

    def _square(self, maps: Tensor, labels: Tensor) -> Batch:
        """A random window; where the picture is smaller, zeros that are ignored at the right and at the bottom."""
        rows, columns = maps.shape[2:]
        top, left = (int(torch.randint(max(0, extent - self.side) + 1, ())) for extent in (rows, columns))
        maps = maps[..., top : top + self.side, left : left + self.side]
        height, width = (self.side - extent for extent in maps.shape[2:])
        p = self.patch_size
        labels = labels[top * p : (top + self.side) * p, left * p : (left + self.side) * p]
        padding = (0, width * p, 0, height * p)
        return F.pad(maps, (0, width, 0, height)), F.pad(labels, padding, value=IGNORED)


class AugmentedCrops:
    """Squares of randomly scaled, flipped and recoloured pictures, encoded anew each time."""

    def __init__(self, encoder: VisionEncoder, images: AnnotatedImages, settings: SegmentationSettings):
        self.encoder, self.images, self.side, self.max_tokens = encoder, images, settings.crop, settings.max_tokens

    def __call__(self, chosen: Sequence[int]) -> Batch:
        cut = [augmented_square(*self.images.open(i), self.side) for i in chosen]
        maps = feature_maps(self.encoder, [image for image, _ in cut], self.max_tokens)
        return torch.stack(maps, dim=1), torch.stack([self.images.labels(annotation) for _, annotation in cut])


def train_head(
    encoder: VisionEncoder,
    crops: Callable[[Sequence[int]], Batch],
    num_images: int,
    num_classes: int,
    settings: SegmentationSettings,
    seed: int = 0,
) -> nn.Module:
    """A head in evaluation mode, trained on `settings.iterations` batches of `crops`."""
    torch.manual_seed(seed)
    config, device = encoder.config, encoder.patch_embed.weight.device
    head = make_head(settings.head, config.width, config.patch_size, num_classes, settings.channels).to(device)

    def batch_loss() -> Tensor:
        maps, labels = crops(torch.randint(num_images, (settings.batch_size,)).tolist())
        scores = F.interpolate(head(maps.to(device)), size=labels.shape[1:], mode="bilinear")
        labels = labels.to(device)
        summed = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
        return summed / (labels != IGNORED).sum().clamp_min(1)  # a batch without any label teaches nothing

    losses = (batch_loss() for _ in range(settings.iterations))
    return fit(head, losses, settings, num_steps=settings.iterations, warmup=settings.warmup, cosine=False)


# --- scores ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(heads: Sequence[nn.Module], maps: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Class of every pixel of one picture by each head, [H, W].

    maps:  [4, D, h, w], as `feature_maps` makes them.
    """
    return [F.interpolate(head(maps.unsqueeze(1)), size=size, mode="bilinear").argmax(1).squeeze(0).cpu() for head in heads]


def areas(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[3 * C] pixels per class: predicted rightly, predicted, labelled. Pixels labelled IGNORED count nowhere."""
    kept = labels != IGNORED
    predicted, labels = predicted[kept], labels[kept]
    kinds = (labels[predicted == labels], predicted, labels)
    return torch.cat([torch.bincount(kind, minlength=num_classes) for kind in kinds])


def class_ious(sums: Tensor) -> Tensor:
    """Summed areas [..., 3 * C] -> intersection over union per class [..., C], nan for a class that is nowhere."""
    right, predicted, labelled = sums.unflatten(-1, (3, -1)).unbind(-2)
    return right / (predicted + labelled - right)


def iou_of(number: int) -> Callable[[Tensor], Tensor]:
    """`class_ious` of one class."""
    return lambda sums: class_ious(sums)[..., number]


def mean_iou(sums: Tensor) -> Tensor:
    """Over the classes that are labelled or predicted anywhere."""
    return class_ious(sums).nanmean(-1)


def pixel_accuracy(sums: Tensor) -> Tensor:
    right, _, labelled = sums.unflatten(-1, (3, -1)).unbind(-2)
    return right.sum(-1) / labelled.sum(-1)


def mean_class_accuracy(sums: Tensor) -> Tensor:
    """Over the classes that are labelled anywhere."""
    right, _, labelled = sums.unflatten(-1, (3, -1)).unbind(-2)
    return (right / labelled).nanmean(-1)


MEASURES = (Measure("mIoU", mean_iou), Measure("mAcc", mean_class_accuracy), Measure("aAcc", pixel_accuracy))


def evaluate_heads(
    encoder: VisionEncoder, heads: Sequence[nn.Module], images: AnnotatedImages, settings: SegmentationSettings
) -> tuple[Tensor, list[Tensor]]:
    """Areas of whole pictures at the size of their annotations, [heads, images, 3 * C], and the first head's classes [H, W] for
    the first NUM_EXAMPLES pictures."""
    counts: list[Tensor] = []
    examples: list[Tensor] = []
    for batch in in_batches(len(images.pairs), settings.batch_size):
        opened = [images.open(i) for i in batch]
        for (_, annotation), maps in zip(opened, feature_maps(encoder, [image for image, _ in opened], settings.max_tokens)):
            labels = images.labels(annotation)
            height, width = labels.shape
            predictions = predict(heads, maps, (height, width))
            counts.append(torch.stack([areas(predicted, labels, len(images.classes)) for predicted in predictions]))
            if len(examples) < NUM_EXAMPLES:
                examples.append(predictions[0].to(torch.uint8))
    return torch.stack(counts, dim=1), examples


# --- program -----------------------------------------------------------------------------------------------------------------


def segmentation_trial(
    name: str, train: AnnotatedImages, test: AnnotatedImages, settings: SegmentationSettings, seeds: int
) -> Trial:
    def run(encoder: VisionEncoder) -> dict[str, Tensor | list[Tensor]]:
        check_crop(encoder, settings)
        crops = (AugmentedCrops if settings.augment else CachedCrops)(encoder, train, settings)
        num_images, num_classes = len(train.pairs), len(train.classes)
        heads = [train_head(encoder, crops, num_images, num_classes, settings, seed) for seed in range(seeds)]
        counts, examples = evaluate_heads(encoder, heads, test, settings)
        return {"counts": counts, "examples": examples}

    measures = list(MEASURES)
    text = (
        f"{dict(upernet='UperNet', linear='Linear')[settings.head]} head on the frozen encoder: {len(train.pairs):,} training "
        f"and {len(test.pairs):,} validation pictures at native resolution, {len(train.classes)} classes, "
        f"{settings.iterations:,} iterations. In per cent, mIoU as mean ± standard deviation of {seeds} heads; change against "
        "the first row ± standard error over validation pictures."
    )
    if len(train.classes) <= MOST_CLASSES_SHOWN:
        text += " The last columns are the IoU of each class."
        measures += [Measure(c, iou_of(k)) for k, c in enumerate(train.classes)]
    data = data_key(*(path for images in (train, test) for pair in images.pairs for path in pair))
    key = f"{dataclasses.asdict(settings)} {seeds} {train.classes} {data}"
    return Trial(name, f"Segmentation: {name}", text, measures, key, run)


def check_crop(encoder: VisionEncoder, settings: SegmentationSettings) -> None:
    """Crops of images must be whole blocks of patches, or features and labels would not cover the same pixels."""
    unit = encoder.config.patch_size * encoder.config.merge_size
    if settings.crop < unit or settings.crop % unit:
        raise ConfigError(f"--crop must be a positive multiple of {unit} pixels for this encoder, got {settings.crop}")


def draw_examples(test: AnnotatedImages, predictions: dict[str, Sequence[Tensor]], path: Path) -> None:
    """A row per picture: itself, its annotation, and the classes found on each encoder. What is ignored is white."""
    count, columns = min(NUM_EXAMPLES, len(test.pairs)), ("picture", "annotation", *predictions)
    palette = plt.get_cmap("tab20" if len(test.classes) > 10 else "tab10")(np.arange(len(test.classes)) % 20)
    palette = np.concatenate((palette, np.ones((1, 4))))  # the last for what is ignored
    figure, axes = plt.subplots(count, len(columns), figsize=(2.2 * len(columns), 2.2 * count), squeeze=False)
    for number, row in enumerate(axes):
        image, annotation = test.open(number)
        labels = test.labels(annotation)
        row[0].imshow(image)
        for ax, classes in zip(row[1:], (labels, *(examples[number] for examples in predictions.values()))):
            ax.imshow(palette[torch.where(classes == IGNORED, len(test.classes), classes.long())])
    for ax, title in zip(axes[0], columns):
        ax.set_title(title)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    if len(test.classes) <= MOST_CLASSES_SHOWN:
        patches = [plt.Rectangle((0, 0), 1, 1, color=palette[k]) for k in range(len(test.classes))]
        figure.legend(patches, test.classes, loc="lower center", ncol=len(patches), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", required=True, help="in ADE20K's layout")
    parser.add_argument("--num-classes", type=positive_int, metavar="N", help="where FOLDER has no classes.txt")
    add_options(parser, SegmentationSettings())
    options = parser.parse_args(arguments)
    try:
        settings = settings_from(options, SegmentationSettings)
        train, test = (annotated_folder(options.data, split, options.num_classes) for split in ("training", "validation"))
        train, test = train.first(options.train_images), test.first(options.test_images)
        name = f"{options.data.name}-{settings.head}"
        trial = segmentation_trial(name, train, test, settings, options.seeds)
        outcomes = run_trial(trial, options.run, encoders_of(options.run, options.stages), options.device)
    except ConfigError as error:
        parser.error(str(error))
    folder = options.run / "probes" / name
    draw_examples(test, {label: outcome["examples"] for label, outcome in outcomes.items()}, folder / "examples.png")
    print(describe_table(folder))
    return 0
