"""The page of a run: `python -m comp.studies.report RUN` writes RUN/report.html (one file) and RUN/report.md.

It shows what the run left behind: stages and losses, held-out scores, example questions with their pictures, and, where these
were made, measures of the tower (`comp.studies.encoder`), the resolution sweep (`comp.studies.sweep`) and probes of the frozen
encoder before and after (`comp.studies.probes`, `comp.studies.segmentation`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...config import Config, ConfigError
from ...data.batch import BadSampleError, LazyImage, Sample
from ...data.datasets import Dataset
from ...data.encode import load_image
from ...data.mixture import open_sources
from ...eval.vqa import OVERALL, all_types
from ...log import read_records
from ...runs import encoders_of, run_config
from ...train.plots import plot_run
from .page import Block, Example, Facts, Gallery, Heading, Picture, Table, Text, write_page
from .pictures import draw_encoders

PLOTS = (
    ("losses.png", "Losses, with their running mean; stages are shaded in turn."),
    ("learning_rates.png", "Learning rate of each part. A gap means that the part was frozen."),
    ("gradient_norms.png", "Gradient norm of each part before clipping."),
    ("speed.png", "Throughput, data loading included."),
)
LARGEST_SIDE = 640  # pixels of an example picture


def write_report(run: Path, *, num_examples: int = 12, pictures: bool = True) -> tuple[Path, Path]:
    """Write the page of the finished or running run in folder `run`; returns the HTML and the Markdown file.

    num_examples:  held-out questions shown, all types in turn.
    pictures:      also draw what the encoder sees before and after; loads both encoders.
    """
    config = run_config(run)
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else {}
    evaluations = read_records(run / "metrics.jsonl", "evaluation")
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    samples = held_out_samples(config)
    blocks = [
        *head(config, summary, evaluations),
        *score_section(run, summary, evaluations),
        *example_section(run, folder, samples, [e["label"] for e in evaluations], num_examples),
        *result_section(run / "encoder", "The vision tower, frozen"),
        *result_section(run / "sweep", "Resolution sweep"),
        *probe_section(run / "probes"),
        *(encoder_section(run, folder, config, samples) if pictures else []),
        *stage_section(config, summary),
        *loss_section(run),
    ]
    return write_page(blocks, f"{config.name}: report", run, "report")


# --- sections ----------------------------------------------------------------------------------------------------------------


def head(config: Config, summary: dict[str, Any], evaluations: Sequence[dict[str, Any]]) -> list[Block]:
    blocks: list[Block] = [Heading(config.name, 1)]
    facts = []
    if evaluations and all(OVERALL in e["scores"] for e in (evaluations[0], evaluations[-1])):
        first, last = (e["scores"][OVERALL]["score"] for e in (evaluations[0], evaluations[-1]))
        facts += [(f"{100 * last:.1f}%", f"held-out score, {100 * first:.1f}% before training")]
    if summary:
        machine = summary["machine"]
        facts += [
            (f"{summary['steps']:,}", "optimiser steps"),
            (f"{summary['images']:,}", "images"),
            (f"{summary['text_tokens']:,}", "text tokens"),
            (
                f"{summary['seconds'] / 60:.1f} min",
                f"on {count_of(machine['processes'], 'process', 'processes')}, {machine['device']}, "
                + count_of(machine["threads"], "thread", "threads"),
            ),
        ]
        if summary["skipped"]["samples"]:
            facts.append((str(summary["skipped"]["samples"]), "unusable samples skipped; messages in summary.json"))
    else:
        blocks.append(Text("This run is not finished: figures are those of its last record."))
    # a folder of a start is called after its part more often than not: its parent tells more
    towers = ("/".join(Path(part.path).parts[-2:]) for part in (config.vision, config.language))
    start = "Vision tower {}, language model {}, seed {}.".format(*towers, config.seed)
    return [*blocks, Text(start), Facts(facts)]


def score_section(run: Path, summary: dict[str, Any], evaluations: Sequence[dict[str, Any]]) -> list[Block]:
    if not evaluations:
        return []
    columns = {**summary.get("baselines", {}), **{e["label"]: e["scores"] for e in evaluations}}
    rows = [
        [
            name,
            str(entry["count"]),
            entry["metric"].replace("_", " "),
            *(percent(column.get(name)) for column in columns.values()),
        ]
        for name, entry in all_types(e["scores"] for e in evaluations).items()
    ]
    text = "Mean score in per cent per kind of question, on questions never trained on, after each stage."
    if summary.get("baselines"):
        text += " The first columns answer without looking at the picture."
    plot_run(run / "metrics.jsonl", run / "plots")
    return [
        Heading("Held-out questions"),
        Text(text),
        Table(["question", "count", "metric", *columns], rows, total=True),
        Picture(run / "plots" / "scores.png"),
    ]


def stage_section(config: Config, summary: dict[str, Any]) -> list[Block]:
    header = ["stage", "trains", "resolution", "rotary", "steps", "token loss", "alignment loss", "images/s"]
    rows = []
    for stage, done in zip(config.stages, summary.get("stages", [{}] * len(config.stages))):
        rates = ", ".join(f"{part} {stage.optim.lr(part):g}" for part in stage.trainable)
        resolution = "native" if stage.resolution is None else str(stage.resolution)
        rotary = "on" if stage.rope else "off"
        losses = [first_to_last(done.get(name)) for name in ("token_loss", "alignment_loss")]
        speed = f"{done['median_images_per_s']:.1f}" if "median_images_per_s" in done else ""
        rows.append([stage.name, rates, resolution, rotary, str(done.get("steps", "")), *losses, speed])
    text = "What each stage trains, with peak learning rates. Losses are means over its first and its last tenth of steps."
    return [Heading("Stages"), Text(text), Table(header, rows)]


def loss_section(run: Path) -> list[Block]:
    drawn = [Picture(run / "plots" / name, caption) for name, caption in PLOTS if (run / "plots" / name).is_file()]
    return [Heading("Training"), *drawn] if drawn else []


def example_section(run: Path, folder: Path, samples: HeldOutSamples, labels: Sequence[str], num_examples: int) -> list[Block]:
    """Held-out questions of every type in turn, each with the answers after every stage."""
    by_label = {label: read_predictions(run / "predictions" / f"{label}.jsonl") for label in labels}
    by_label = {label: predictions for label, predictions in by_label.items() if predictions}
    if not by_label or not samples:
        return []
    last = list(by_label.values())[-1]
    examples: list[Example] = []
    for name in choose_names([p for p in last.values() if p["name"] in samples], num_examples):
        pictures = save_pictures(open_pictures(samples[name]), folder / f"example{len(examples)}")
        shown = [(label, p[name]["prediction"], p[name]["score"]) for label, p in by_label.items() if name in p]
        examples.append(Example(pictures, last[name]["question"], last[name]["answers"], shown))
    text = "Picked by kind of question, not by success; answers before training and after each stage."
    return [Heading("Examples"), Text(text), Gallery(examples)] if examples else []


def result_section(folder: Path, title: str = "", level: int = 2) -> list[Block]:
    """A page section that another program left: folder/table.json {"text", "header", "rows"}, where given with a "title" of its
    own and "total" for the last row, and pictures beside it."""
    if not (folder / "table.json").is_file():
        return []
    result = json.loads((folder / "table.json").read_text())
    pictures = [Picture(path) for path in sorted(folder.glob("*.png"))]
    heading = Heading(result.get("title", title), level)
    return [heading, Text(result["text"]), Table(result["header"], result["rows"], result.get("total", False)), *pictures]


def probe_section(folder: Path) -> list[Block]:
    """The probes below `folder`, each as its program left it."""
    trials = [block for place in sorted(folder.glob("*")) for block in result_section(place, level=3)]
    text = "Small heads trained on features of the frozen encoder: what it sees without the language model."
    return [Heading("Frozen probes, before and after"), Text(text), *trials] if trials else []


def encoder_section(run: Path, folder: Path, config: Config, samples: HeldOutSamples) -> list[Block]:
    if not (run / "models" / config.stages[-1].name / "vision").is_dir():
        return []
    images = telling_pictures(samples, 3)
    if not images:
        return []
    drawn = draw_encoders(dict(encoders_of(run)), images, folder)
    return [Heading("What the encoder sees"), *(Picture(path, caption) for path, caption in drawn)]


# --- parts -------------------------------------------------------------------------------------------------------------------


def count_of(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def telling_pictures(samples: HeldOutSamples, count: int) -> list[Image.Image]:
    """Of the first pictures, the kinds of question in turn, the `count` that a square holds best: narrow ones show little."""
    opened = (open_pictures(samples[name])[:1] for name in choose_names(samples.with_pictures, 4 * count))
    different = {picture.tobytes(): picture for pictures in opened for picture in pictures}
    return sorted(different.values(), key=lambda picture: min(picture.size) / max(picture.size), reverse=True)[:count]


def percent(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{100 * entry['score']:.1f}"


def first_to_last(loss: dict[str, float] | None) -> str:
    return "" if loss is None else f"{loss['first']:.3f} → {loss['last']:.3f}"


class HeldOutSamples(Mapping[str, Sample]):
    """Samples by name, without those that cannot be read. Only their places are kept: a sample is read again when it is
    shown, since those of a benchmark may hold their pictures."""

    def __init__(self, samples: Dataset | Sequence[Sample]):
        self._samples = samples
        self._places: dict[str, int] = {}
        self.with_pictures: list[dict[str, str]] = []
        """{"name", "question_type"} of those that have any."""
        for place in range(len(samples)):
            try:
                sample = samples[place]
            except BadSampleError as error:
                print(f"no example: {error}", file=sys.stderr)
                continue
            self._places[sample.name] = place
            if pictures_of(sample):
                self.with_pictures.append(dict(name=sample.name, question_type=sample.question_type))

    def __getitem__(self, name: str) -> Sample:
        return self._samples[self._places[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._places  # the mapping's own would read the sample

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def held_out_samples(config: Config) -> HeldOutSamples:
    """Those of a run; none when their files are no longer there."""
    try:
        return HeldOutSamples(open_sources(config.eval.data, config.seed) if config.eval.data else [])
    except (OSError, ValueError) as error:
        print(f"no example pictures: {error}", file=sys.stderr)
        return HeldOutSamples([])


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    return {p["name"]: p for p in map(json.loads, path.read_bytes().splitlines())}


def choose_names(predictions: Sequence[dict[str, Any]], count: int) -> list[str]:
    """`count` names, the kinds of question in turn, in the order of the file."""
    queues: dict[str, list[str]] = {}
    for prediction in predictions:
        queues.setdefault(prediction["question_type"], []).append(prediction["name"])
    turns = max((len(queue) for queue in queues.values()), default=0)
    return [queue[turn] for turn in range(turns) for queue in queues.values() if turn < len(queue)][:count]


def pictures_of(sample: Sample) -> list[LazyImage]:
    return [image for message in sample.messages for image in message.images]


def open_pictures(sample: Sample) -> list[Image.Image]:
    """All of a sample, or none where one cannot be read."""
    try:
        return [load_image(image, sample.name) for image in pictures_of(sample)]
    except BadSampleError as error:
        print(f"no pictures of {error}", file=sys.stderr)
        return []


def save_pictures(pictures: Sequence[Image.Image], stem: Path) -> list[Path]:
    paths = []
    for number, picture in enumerate(pictures):
        picture = picture.copy()  # it may be the sample's own
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        paths.append(stem.with_name(f"{stem.name}_{number}.png"))
        picture.save(paths[-1])
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, for example runs/tiny")
    parser.add_argument("--examples", type=int, default=12, help="held-out questions to show (default: 12)")
    parser.add_argument("--no-pictures", action="store_true", help="do not load the encoders to draw what they see")
    options = parser.parse_args(arguments)
    try:
        pages = write_report(options.run, num_examples=options.examples, pictures=not options.no_pictures)
    except ConfigError as error:
        parser.error(str(error))
    print("\n".join(map(str, pages)))
    return 0
