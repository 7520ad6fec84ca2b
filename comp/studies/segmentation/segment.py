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
from ...config import MAX_VISUAL_TOKENS, ConfigError
from ...data.batch import IGNORED
from ...data.images import to_raster
from ...eval.batches import in_batches
from ...model import VisionEncoder
from ...parallel import CPU_ALONE, Place
from ...train.plots import plain_text
from ..probes.frozen import Measure, Trial, data_key, fit, probe_command
from .data import AnnotatedImages, annotated_folder, augmented_square
from .heads import make_head

NUM_EXAMPLES = 4
MOST_CLASSES_SHOWN = 12


@dataclass(frozen=True)
class SegmentationSettings:
    """Defaults for small pictures; PAPER are the paper's values."""

    head: str = field(default="upernet", metadata={"choices": ("upernet", "linear")})
    channels: int = 32  # of UperNet inside
    crop: int = 96
    """Side of the squares that are trained on, in pixels."""
    max_tokens: int = MAX_VISUAL_TOKENS
    """Larger pictures are scaled down, keeping the aspect ratio; h * w / merge_size^2."""
    iterations: int = 400
    warmup: int = field(default=20, metadata={"least": 0})
    batch_size: int = field(default=16, metadata={"least": 2})  # over all processes; UperNet normalises a value per picture
    lr: float = 1e-3
    min_lr: float = field(default=0.0, metadata={"least": 0})
    weight_decay: float = field(default=0.05, metadata={"least": 0})
    augment: bool = field(default=False, metadata={"help": "scale (0.5 to 2), flip and recolour training pictures"})


PAPER = SegmentationSettings(channels=512, crop=504, iterations=80_000, warmup=1500, lr=4e-5, augment=True)
"""ADE20K at 504 pixels, Table 14 (672 for the larger size); UperNet's channels are not said, 512 is the original's."""


# --- features ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def feature_maps(
    encoder: VisionEncoder, images: Sequence[Image.Image], max_tokens: int = MAX_VISUAL_TOKENS, place: Place = CPU_ALONE
) -> list[Tensor]:
    """[4, D, h, w] float32 per picture at native resolution, packed: four evenly spaced layers, each patch normalised as
    LayerNorm does without weights."""
    if not images:
        return []
    num_layers, merge_size = len(encoder.blocks), encoder.config.merge_size
    layers = [max(0, (number * num_layers) // 4 - 1) for number in (1, 2, 3, 4)]
    prepared = [encoder.prepare(image, max_tokens=max_tokens) for image in images]
    pixel_values = torch.cat([patches for patches, _ in prepared]).to(encoder.patch_embed.weight.device)
    grids = [grid for _, grid in prepared]
    with place.autocast():
        _, taps = encoder(pixel_values, torch.tensor(grids), return_layers=layers)
    taps = [taps[layer].float() for layer in layers]
    stacked = torch.stack([F.layer_norm(tap, tap.shape[-1:]) for tap in taps], dim=1)  # [N, 4, D]
    maps = to_raster(stacked.flatten(1), grids, merge_size)
    return [one.squeeze(0).unflatten(-1, stacked.shape[1:]).permute(2, 3, 0, 1) for one in maps]


# --- training ----------------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]  # maps [4, B, D, h, w] and labels [B, H, W]


class CachedCrops:
    """Squares out of the feature maps of whole pictures, which are computed once and kept in main memory, each process its
    own. The squares of a batch are those of all processes."""

    def __init__(
        self, encoder: VisionEncoder, images: AnnotatedImages, settings: SegmentationSettings, place: Place = CPU_ALONE
    ):
        self.place = place
        self.width, self.patch_size = encoder.config.width, encoder.config.patch_size
        self.side = settings.crop // self.patch_size
        self.maps: list[Tensor] = []
        self.labels: list[Tensor] = []
        own = place.world.own(range(len(images.pairs)))
        for batch in in_batches(len(own), settings.batch_size):
            opened = [images.open(own[i]) for i in batch]
            maps = feature_maps(encoder, [image for image, _ in opened], settings.max_tokens, place)
            self.maps += [one.cpu() for one in maps]
            for (_, annotation), one in zip(opened, maps):
                size = [side * self.patch_size for side in (one.shape[3], one.shape[2])]  # width, height
                self.labels.append(images.labels(annotation.resize(size, Image.Resampling.NEAREST)).to(torch.int16))

    def __call__(self, chosen: Sequence[int]) -> Batch:
        world = self.place.world
        own = world.own(chosen)
        windows = torch.rand(len(chosen), 2).tolist()  # the same on every process, whatever it has of the batch
        cut = [
            self._square(self.maps[i // world.size], self.labels[i // world.size], window)
            for i, window in zip(chosen, windows)
            if i in own
        ]
        side = self.side
        maps = torch.stack([m for m, _ in cut]) if cut else torch.zeros(0, 4, self.width, side, side)
        pixels = side * self.patch_size
        labels = torch.stack([one for _, one in cut]).long() if cut else torch.zeros(0, pixels, pixels, dtype=torch.long)
        return in_order(maps, labels, chosen, self.place)

    def _square(self, maps: Tensor, labels: Tensor, window: Sequence[float]) -> Batch:
        """A window at a place in [0, 1) x [0, 1); where the picture is smaller, zeros that are ignored at the right and at the
        bottom."""
        rows, columns = maps.shape[2:]
        top, left = (int(part * (max(0, extent - self.side) + 1)) for part, extent in zip(window, (rows, columns)))
        maps = maps[..., top : top + self.side, left : left + self.side]
        height, width = (self.side - extent for extent in maps.shape[2:])
        p = self.patch_size
        labels = labels[top * p : (top + self.side) * p, left * p : (left + self.side) * p]
        padding = (0, width * p, 0, height * p)
        return F.pad(maps, (0, width, 0, height)), F.pad(labels, padding, value=IGNORED)


class AugmentedCrops:
    """Squares of randomly scaled, flipped and recoloured pictures, encoded anew each time."""

    def __init__(
        self, encoder: VisionEncoder, images: AnnotatedImages, settings: SegmentationSettings, place: Place = CPU_ALONE
    ):
        self.encoder, self.images, self.side, self.max_tokens = encoder, images, settings.crop, settings.max_tokens
        self.place = place

    def __call__(self, chosen: Sequence[int]) -> Batch:
        own = self.place.world.own(chosen)
        # a share may be empty, and still has its shape
        cut = [augmented_square(*self.images.open(i), self.side) for i in own or chosen[:1]]
        maps = torch.stack(feature_maps(self.encoder, [image for image, _ in cut], self.max_tokens, self.place))
        labels = torch.stack([self.images.labels(annotation) for _, annotation in cut])
        return in_order(maps[: len(own)], labels[: len(own)], chosen, self.place)


def in_order(maps: Tensor, labels: Tensor, chosen: Sequence[int], place: Place) -> Batch:
    """The whole batch on the device, from the shares [n, 4, D, h, w] and [n, H, W] of all processes."""
    whole = place.world.in_order(maps.to(place.device), chosen)
    return whole.transpose(0, 1), place.world.in_order(labels.to(place.device), chosen)


def train_head(
    encoder: VisionEncoder,
    crops: Callable[[Sequence[int]], Batch],
    num_images: int,
    num_classes: int,
    settings: SegmentationSettings,
    seed: int = 0,
) -> nn.Module:
    """A head in evaluation mode, trained on `settings.iterations` batches of `crops`, on every process the same."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    config, device = encoder.config, encoder.patch_embed.weight.device
    head = make_head(settings.head, config.width, config.patch_size, num_classes, settings.channels).to(device)

    def batch_loss() -> Tensor:
        maps, labels = crops(torch.randint(num_images, (settings.batch_size,), generator=order).tolist())
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
    encoder: VisionEncoder,
    heads: Sequence[nn.Module],
    images: AnnotatedImages,
    settings: SegmentationSettings,
    place: Place = CPU_ALONE,
) -> tuple[Tensor, list[Tensor]]:
    """Areas of whole pictures at the size of their annotations, [heads, images, 3 * C], and the first head's classes [H, W] for
    the first NUM_EXAMPLES pictures; of all processes, on each."""
    own = place.world.own(range(len(images.pairs)))
    found: list[tuple[int, Tensor, Tensor | None]] = []
    for batch in in_batches(len(own), settings.batch_size):
        opened = [images.open(own[i]) for i in batch]
        together = feature_maps(encoder, [image for image, _ in opened], settings.max_tokens, place)
        for number, (_, annotation), maps in zip((own[i] for i in batch), opened, together):
            labels = images.labels(annotation)
            height, width = labels.shape
            predictions = predict(heads, maps, (height, width))
            counts = torch.stack([areas(predicted, labels, len(images.classes)) for predicted in predictions])
            found.append((number, counts, predictions[0].to(torch.uint8) if number < NUM_EXAMPLES else None))
    everything = [one for share in place.world.gather(found) for one in share]
    everything.sort(key=lambda one: one[0])
    return torch.stack([c for _, c, _ in everything], dim=1), [e for _, _, e in everything if e is not None]


# --- program -----------------------------------------------------------------------------------------------------------------


def segmentation_trial(
    name: str,
    train: AnnotatedImages,
    test: AnnotatedImages,
    settings: SegmentationSettings,
    seeds: int,
    place: Place = CPU_ALONE,
) -> Trial:
    def run(encoder: VisionEncoder) -> dict[str, Tensor | list[Tensor]]:
        check_crop(encoder, settings)
        crops = (AugmentedCrops if settings.augment else CachedCrops)(encoder, train, settings, place)
        num_images, num_classes = len(train.pairs), len(train.classes)
        heads = [train_head(encoder, crops, num_images, num_classes, settings, seed) for seed in range(seeds)]
        counts, examples = evaluate_heads(encoder, heads, test, settings, place)
        return {"counts": counts, "examples": examples}

    def draw(outcomes: dict[str, dict], folder: Path) -> None:
        draw_examples(test, {label: outcome["examples"] for label, outcome in outcomes.items()}, folder / "examples.png")

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
    return Trial(name, f"Segmentation: {name}", text, measures, key, run, draw)


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
        figure.legend(
            patches, list(map(plain_text, test.classes)), loc="lower center", ncol=len(patches), frameon=False, fontsize=8
        )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", required=True, help="in ADE20K's layout")
    parser.add_argument("--num-classes", type=positive_int, metavar="N", help="where FOLDER has no classes.txt")
    return probe_command(parser, arguments, SegmentationSettings(), PAPER, trial_of)


def trial_of(options: argparse.Namespace, settings: SegmentationSettings, place: Place) -> Trial:
    """What the command line asks for."""
    train, test = (annotated_folder(options.data, split, options.num_classes) for split in ("training", "validation"))
    train, test = train.first(options.train_images), test.first(options.test_images)
    return segmentation_trial(f"{options.data.name}-{settings.head}", train, test, settings, options.seeds, place)
