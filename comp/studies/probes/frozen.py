"""What the probes of frozen encoders share: training of heads, kept results, and the table they become.

A probe leaves counts for every test image. Scores come from their sums, and whether a change of the score is more than chance
comes from drawing the same test images again for both encoders (paired bootstrap).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...cli import positive_int
from ...config import ConfigError
from ...data.batch import BadSampleError
from ...eval.batches import RESAMPLES
from ...log import table
from ...model import VisionEncoder
from ...parallel import Place, add_place_options, place_of, stop_world
from ...runs import encoders_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FETCHED = ("digits", "fashion-mnist", "stamp-segmentation")
"""Folders that comp.fetch.probes makes: small pictures, few of them."""
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Measure:
    """A score in [0, 1] made of counts that are summed over images."""

    name: str
    score: Callable[[Tensor], Tensor]
    """Sums [..., K] float64 -> scores [...]."""


@dataclass(frozen=True)
class Trial:
    """One probe experiment, the same for every encoder."""

    name: str
    """Of its folder below RUN/probes."""
    title: str
    text: str
    """What was measured on what, for the report page."""
    measures: Sequence[Measure]
    """The first is the one whose change is judged."""
    key: str
    """Everything that the outcome depends on but the encoder. A kept outcome with another key is measured anew."""
    run: Callable[[VisionEncoder], Mapping[str, Tensor | list[Tensor]]]
    """Returns "counts" [probes, images, K], and whatever else is to be kept."""
    draw: Callable[[dict[str, dict], Path], None] | None = None
    """Pictures of the outcomes by encoder, into the trial's folder."""


def fit(head: nn.Module, losses: Iterable[Tensor], settings: Any, *, num_steps: int, warmup: float, cosine: bool) -> nn.Module:
    """Train `head` with AdamW; returns it in evaluation mode.

    losses:    of `num_steps` batches; each is asked for when the step before is done.
    settings:  rates (see `learning_rate`) and weight decay.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    for step, loss in enumerate(losses):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, warmup, settings, cosine=cosine)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def learning_rate(step: int, total: int, warmup: float, settings: Any, *, cosine: bool) -> float:
    """Linear warm-up from 0 to settings.lr, then down to settings.min_lr along half a cosine or a line."""
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, total - warmup)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1 - progress
    return settings.min_lr + (settings.lr - settings.min_lr) * left


def subset(items: Sequence, count: int | None) -> list:
    """`count` items in their order, always the same ones; all where there are no more or none is asked for."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in sorted(np.random.default_rng(0).permutation(len(items))[:count])]


# --- outcomes ----------------------------------------------------------------------------------------------------------------


def run_trial(trial: Trial, run: Path, encoders: Iterator[tuple[str, VisionEncoder]], place: Place) -> dict[str, dict]:
    """The outcome per encoder, kept in RUN/probes/NAME: an interrupted trial goes on with the encoders that are missing.
    Writes table.json there, which the report page shows, and what the trial draws. All processes call it, the first one reads
    and writes."""
    folder, world = run / "probes" / trial.name, place.world
    outcomes: dict[str, dict] = {}
    for label, encoder in encoders:  # the first one has found RUN to be a run
        kept, key = folder / f"{label}.pt", f"{trial.key} {fingerprint(encoder)}{' bf16' if place.bf16 else ''}"
        outcome: dict = {}
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            outcome = torch.load(kept, weights_only=True) if kept.is_file() else {}
        if world.gather(outcome.get("key"))[0] != key:
            outcome = {"key": key, **trial.run(encoder.to(place.device))}
            if world.is_main:
                torch.save(outcome, kept)
        outcomes[label] = outcome
    if world.is_main:
        made = make_table({label: outcome["counts"] for label, outcome in outcomes.items()}, trial.measures)
        (folder / "table.json").write_text(json.dumps(dict(title=trial.title, text=trial.text, **made), indent=1))
        if trial.draw is not None:
            trial.draw(outcomes, folder)
    return outcomes


def fingerprint(encoder: VisionEncoder) -> str:
    """Of weights and choices."""
    digest = hashlib.sha256(repr(encoder.config).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def data_key(*items: Image.Image | Path | int) -> str:
    """Changes when a picture, the name or size of a file, or a label does."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, Image.Image):
            digest.update(item.tobytes())
        else:
            named = f"{item.parent.name}/{item.name} {item.stat().st_size}" if isinstance(item, Path) else str(item)
            digest.update(f"{named}\n".encode())
    return digest.hexdigest()


def make_table(counts: dict[str, Tensor], measures: Sequence[Measure]) -> dict[str, list]:
    """Rows of encoders, all in per cent: the first measure as mean ± standard deviation over probes, its change against the
    first encoder ± standard error over test images, the means of the other measures."""
    first, *others = measures
    header = ["encoder", first.name, "change", *(measure.name for measure in others)]
    baseline = next(iter(counts.values()))
    rows = []
    for label, own in counts.items():
        scores = 100 * first.score(own.double().sum(1))
        spread = f" ± {scores.std():.2f}" if len(scores) > 1 else ""
        change = "" if own is baseline else "{:+.2f} ± {:.2f}".format(*change_of(baseline, own, first))
        means = (f"{100 * measure.score(own.double().sum(1)).mean():.1f}" for measure in others)
        rows.append([label, f"{scores.mean():.2f}{spread}", change, *means])
    return dict(header=header, rows=rows)


def change_of(before: Tensor, after: Tensor, measure: Measure) -> tuple[float, float]:
    """Change of the mean score over probes and its standard error over test images, in per cent.

    before, after:  counts [probes, images, K] on the same images.
    """
    generator = torch.Generator().manual_seed(0)
    num_images = before.shape[1]
    drawn = torch.randint(num_images, (RESAMPLES, num_images), generator=generator)
    weights = torch.zeros(RESAMPLES, num_images, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))

    def score(weights: Tensor) -> Tensor:  # [R, images] -> [R]
        a, b = (measure.score(torch.einsum("rn,pnk->rpk", weights, x.double())).mean(1) for x in (before, after))
        return 100 * (b - a)

    return score(torch.ones(1, num_images, dtype=torch.float64)).item(), score(weights).std().item()


# --- command line ------------------------------------------------------------------------------------------------------------


def probe_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    small: DataclassInstance,
    paper: DataclassInstance,
    make_trial: Callable[[argparse.Namespace, Any, Place], Trial],
) -> int:
    """Run a probe from its command line and print its table.

    parser:      has `--data` and what else is the probe's own.
    make_trial:  from options, settings and place; may raise ConfigError.
    """
    add_options(parser, small, paper)
    options = parser.parse_args(arguments)
    try:
        settings = settings_from(options, small, paper, data=options.data)
        place = place_of(options)
        trial = make_trial(options, settings, place)
        run_trial(trial, options.run, encoders_of(options.run, options.stages), place)
    except (ConfigError, BadSampleError) as error:
        parser.error(str(error))
    if place.world.is_main:
        print(describe_table(options.run / "probes" / trial.name))
    stop_world(place.world)
    return 0


def add_options(parser: argparse.ArgumentParser, small: DataclassInstance, paper: DataclassInstance) -> None:
    """RUN, the options of every probe, and one option per field of the settings.

    small, paper:  instances of the dataclass of the settings: for the data that comp.fetch.probes makes, and the paper's.
    """
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, for example runs/tiny")
    parser.add_argument(
        "--stages", nargs="+", metavar="STAGE", help="whose encoders to compare with the start (default: the last)"
    )
    parser.add_argument(
        "--settings",
        choices=("small", "paper"),
        help="what the options below start from (default: small for what comp.fetch.probes makes, else paper)",
    )
    parser.add_argument("--seeds", type=positive_int, help="probes trained per encoder (default: 3; with --settings paper 1)")
    parser.add_argument("--train-images", type=positive_int, metavar="N", help="use N of the training images (default: all)")
    parser.add_argument("--test-images", type=positive_int, metavar="N", help="use N of the test images (default: all)")
    add_place_options(parser)
    for field in dataclasses.fields(small):
        value, flag = getattr(small, field.name), f"--{field.name.replace('_', '-')}"
        both = f"default: {value}, the paper's {getattr(paper, field.name)}"
        if isinstance(value, bool):
            text = f"{field.metadata.get('help', '')} ({both})".strip()
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=type(value), choices=field.metadata.get("choices"), help=both)


def settings_from(options: argparse.Namespace, small: Any, paper: Any, *, data: Path | None) -> Any:
    """The options as settings, those not given from `small` or `paper`; `options.seeds` is set as well. ConfigError for a
    number that cannot train: below its field's metadata "least", or where there is none not more than 0.

    data:  the folder that is probed, None for what comes with a package.
    """
    is_small = options.settings == "small" or (options.settings is None and (data is None or data.name in FETCHED))
    start = small if is_small else paper
    if options.seeds is None:
        options.seeds = 3 if is_small else 1
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(start)}
    values = {name: getattr(start, name) if value is None else value for name, value in given.items()}
    for field in dataclasses.fields(start):
        value, least = values[field.name], field.metadata.get("least")
        if type(value) in (int, float) and not (value > 0 if least is None else value >= least):
            needed = "more than 0" if least is None else f"at least {least}"
            raise ConfigError(f"--{field.name.replace('_', '-')} must be {needed}, got {value}")
    return type(start)(**values)


def describe_table(folder: Path) -> str:
    """The table of a finished trial as text."""
    found = json.loads((folder / "table.json").read_text())
    return table(found["header"], found["rows"])
