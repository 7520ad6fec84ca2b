"""Frozen classification: `python -m comp.studies.probes RUN` trains attentive probes on the encoders of a run.

The encoder does not change; the probe is what sees the labels (CoMP, arXiv 2503.18931, Table 3a; the head is AIM's, as the
paper names none). Data: scikit-learn's digits, or a folder in ImageNet layout: `train/CLASS/*.png` and `val/CLASS/*.png`.
Writes RUN/probes/NAME/table.json, which the report page shows; the encoder that the run started from is always a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from ...config import ConfigError
from ...data.decode import to_rgb
from ...data.encode import load_image
from ...eval.batches import in_batches
from ...model import VisionEncoder
from ...parallel import CPU_ALONE, Place
from ...tiny.digits import load_scans
from .frozen import IMAGE_ENDINGS, Measure, Trial, data_key, fit, probe_command, subset


@dataclass(frozen=True)
class ProbeSettings:
    """Defaults for small pictures; PAPER are the paper's values."""

    size: int = 64
    """Side of the square images in pixels."""
    epochs: int = 10
    warmup_epochs: float = field(default=1.0, metadata={"least": 0})
    batch_size: int = 64
    """Over all processes."""
    lr: float = 1e-3
    min_lr: float = field(default=1e-5, metadata={"least": 0})
    weight_decay: float = field(default=0.05, metadata={"least": 0})
    augment: bool = field(default=False, metadata={"help": "crop (area 8%% to 100%%) and flip at random"})


PAPER = ProbeSettings(size=224, batch_size=1024, lr=1e-4, min_lr=2e-5, augment=True)
"""ImageNet at 224 pixels, Table 13; at 448 it has batches of 256, rates of 1e-5 and 5e-6."""


class AttentiveProbe(nn.Module):
    """Normalised tokens, pooled by one learned query over all of them, then a linear classifier: features [B, T, D] -> [B, C].

    As in AIM (arXiv 2401.08541): batch normalisation without parameters, keys and values without bias, no output projection.
    """

    def __init__(self, width: int, num_classes: int, num_heads: int = 12):
        super().__init__()
        self.num_heads = max(h for h in range(1, num_heads + 1) if width % h == 0)
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.classifier = nn.Linear(width, num_classes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(features.transpose(1, 2)).transpose(1, 2)

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, D / H]

        query = self.query.expand(len(x), -1, -1)
        pooled = F.scaled_dot_product_attention(heads(query), heads(self.key(x)), heads(self.value(x)))
        return self.classifier(pooled.transpose(1, 2).flatten(1))


# --- data --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImages:
    images: Sequence[Image.Image | Path]
    labels: Sequence[int]
    num_classes: int

    def open(self, index: int) -> Image.Image:
        image = self.images[index]
        return load_image(str(image), "a probe") if isinstance(image, Path) else to_rgb(image)

    def first(self, count: int | None) -> LabelledImages:
        """`count` of the images, drawn from all of them."""
        chosen = subset(range(len(self.labels)), count)
        return LabelledImages([self.images[i] for i in chosen], [self.labels[i] for i in chosen], self.num_classes)


def digit_images(split: str) -> LabelledImages:
    """scikit-learn's handwritten digits, black on white: 1,438 for "train", 359 for "heldout"."""
    pairs = [(ImageOps.invert(scan), digit) for digit, scans in load_scans(split).items() for scan in scans]
    return LabelledImages([image for image, _ in pairs], [digit for _, digit in pairs], 10)


def folder_images(folder: Path, classes: Sequence[str] | None = None) -> LabelledImages:
    """folder/CLASS/*.png (or .jpg, .webp); classes in alphabetical order, or those given."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found or (classes is not None and set(found) != set(classes)):
        raise ConfigError(
            f"{folder} must hold one folder of images per class{f', {list(classes)}' if classes else ''}, got {found}"
        )
    classes = found if classes is None else classes
    pairs = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in IMAGE_ENDINGS
    ]
    if not pairs:
        raise ConfigError(f"{folder} holds no image ({', '.join(IMAGE_ENDINGS)}) in its folders {found}")
    return LabelledImages([path for path, _ in pairs], [label for _, label in pairs], len(classes))


# --- training ----------------------------------------------------------------------------------------------------------------


def correct_answers(
    encoder: VisionEncoder,
    train: LabelledImages,
    test: LabelledImages,
    settings: ProbeSettings,
    seed: int = 0,
    cache: dict[str, Tensor] | None = None,
    place: Place = CPU_ALONE,
) -> Tensor:
    """Which images of `test` a probe trained on `train` classifies correctly, [n] bool. The encoder is not changed.

    cache:  keeps features between calls that differ in `seed` alone; start with an empty one.
    place:  of the encoder. Each process encodes its share of every batch and keeps features of its own images alone; the probe,
            small beside the encoder, learns from whole batches on all of them, in float32.
    """
    world, device = place.world, place.device
    encoder.eval()
    cache = {} if cache is None else cache
    if "test" not in cache:
        cache["test"] = own_features(encoder, test, settings, place)
    if "train" not in cache and not settings.augment:
        cache["train"] = own_features(encoder, train, settings, place)
    torch.manual_seed(seed)
    probe = AttentiveProbe(encoder.config.width, train.num_classes).to(device)
    labels = torch.tensor(train.labels, device=device)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed * world.size + world.rank)  # crops are drawn by each process for itself

    def losses() -> Iterator[Tensor]:
        for _ in range(settings.epochs):
            for chosen in torch.randperm(len(labels), generator=order).split(settings.batch_size):
                own = world.own(chosen.tolist())
                if settings.augment:
                    x = encode(encoder, [augmented(train.open(i)) for i in own], settings.size, place)
                else:
                    x = cache["train"][[i // world.size for i in own]]
                yield F.cross_entropy(probe(world.in_order(x.to(device), chosen.tolist())), labels[chosen])

    steps_per_epoch = math.ceil(len(labels) / settings.batch_size)
    num_steps, warmup = settings.epochs * steps_per_epoch, settings.warmup_epochs * steps_per_epoch
    fit(probe, losses(), settings, num_steps=num_steps, warmup=warmup, cosine=True)
    with torch.no_grad():
        predicted = torch.cat([probe(x.to(device)).argmax(-1) for x in cache["test"].split(settings.batch_size)])
    return world.in_order(predicted, range(len(test.labels))).cpu() == torch.tensor(test.labels)


def own_features(encoder: VisionEncoder, images: LabelledImages, settings: ProbeSettings, place: Place) -> Tensor:
    """[n, T, D] of the images that are this process's, kept in main memory."""
    own = place.world.own(range(len(images.labels)))
    batches = in_batches(len(own), max(1, settings.batch_size // place.world.size))
    features = [encode(encoder, [images.open(own[i]) for i in batch], settings.size, place).cpu() for batch in batches]
    return torch.cat(features) if features else encode(encoder, [], settings.size, place).cpu()


@torch.no_grad()
def encode(encoder: VisionEncoder, images: Sequence[Image.Image], size: int, place: Place = CPU_ALONE) -> Tensor:
    """[B, T, D] float32; the order of the tokens does not matter to the probe."""
    if not images:  # a share may be empty, and still has its shape
        return encode(encoder, [Image.new("RGB", (size, size))], size, place)[:0]
    prepared = [encoder.prepare(image, size=(size, size)) for image in images]
    pixel_values = torch.cat([patches for patches, _ in prepared]).to(encoder.patch_embed.weight.device)
    with place.autocast():
        features = encoder(pixel_values, torch.tensor([grid for _, grid in prepared])).float()
    return features.unflatten(0, (len(images), -1))


def augmented(image: Image.Image) -> Image.Image:
    """A random crop, flipped half of the time: area 8% to 100%, aspect ratio 3/4 to 4/3."""
    width, height = image.size
    area = width * height * float(torch.empty(1).uniform_(0.08, 1.0))
    ratio = math.exp(float(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3))))
    w = max(1, min(width, round((area * ratio) ** 0.5)))
    h = max(1, min(height, round((area / ratio) ** 0.5)))
    x, y = (int(torch.randint(0, n + 1, ())) for n in (width - w, height - h))
    image = image.crop((x, y, x + w, y + h))
    return ImageOps.mirror(image) if torch.rand(()) < 0.5 else image


# --- program -----------------------------------------------------------------------------------------------------------------

ACCURACY = Measure("accuracy", lambda sums: sums[..., 0] / sums[..., 1])


def classification_trial(
    name: str,
    described: str,
    train: LabelledImages,
    test: LabelledImages,
    settings: ProbeSettings,
    seeds: int,
    place: Place = CPU_ALONE,
) -> Trial:
    def run(encoder: VisionEncoder) -> dict[str, Tensor]:
        cache: dict[str, Tensor] = {}
        answers = (correct_answers(encoder, train, test, settings, seed, cache, place) for seed in range(seeds))
        correct = torch.stack(list(answers))
        return {"counts": torch.stack((correct, torch.ones_like(correct)), dim=-1).int()}

    text = (
        f"Attentive probe on {described}: {len(train.labels):,} training and {len(test.labels):,} test images at "
        f"{settings.size} pixels, {settings.epochs} epochs. In per cent, accuracy as mean ± standard deviation of {seeds} "
        "probes; change against the first row ± standard error over test images."
    )
    data = data_key(*train.images, *train.labels, *test.images, *test.labels)
    key = f"{dataclasses.asdict(settings)} {seeds} {data}"
    return Trial(name, f"Classification: {name}", text, [ACCURACY], key, run)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with train/ and val/ (default: scikit-learn's digits)")
    return probe_command(parser, arguments, ProbeSettings(), PAPER, trial_of)


def trial_of(options: argparse.Namespace, settings: ProbeSettings, place: Place) -> Trial:
    """What the command line asks for."""
    if options.data is None:
        train, test = digit_images("train"), digit_images("heldout")
        name, described = "digits", "handwritten digits (scikit-learn)"
    else:
        train = folder_images(options.data / "train")
        test = folder_images(options.data / "val", sorted(p.name for p in (options.data / "train").iterdir() if p.is_dir()))
        name = described = options.data.name
    train, test = train.first(options.train_images), test.first(options.test_images)
    return classification_trial(name, described, train, test, settings, options.seeds, place)
