"""Resolution sweep: `python -m comp.studies.sweep RUN` answers the held-out questions under several caps on visual tokens.

Images stay at native size and are scaled down only where the cap asks for it (CoMP, arXiv 2503.18931, Figure 3). Questions are
those of the run, or benchmarks and files named as for comp.eval.evaluate. Under torchrun the processes share them. Writes
RUN/sweep/{table.json, sweep.png}, which the report page shows.

    torchrun --nproc-per-node 8 -m comp.studies.sweep runs/mine chartqa=/data/ChartQA docvqa=/data/DocVQA --caps 256 1024 2304
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..build import build_model, sample_encoder, set_position_mode
from ..cli import positive_int
from ..config import Config, ConfigError
from ..data.datasets import Dataset
from ..data.mixture import open_sources
from ..eval.evaluate import open_all
from ..eval.vqa import OVERALL, Prediction, all_types, answer_questions, percent, scores_by_type
from ..parallel import CPU_ALONE, Place, add_place_options, place_of, stop_world
from ..runs import trained_config
from ..train.plots import plain_text

CAPS = (8, 16, 32, 64, 128)


def sweep(
    config: Config,
    caps: Sequence[int],
    num_questions: int | None = None,
    *,
    questions: Sequence[str] = (),
    place: Place = CPU_ALONE,
) -> dict[int, dict[str, dict[str, Any]]]:
    """Scores by question type (as `scores_by_type`) for every cap on the visual tokens of a question, on every process.

    questions:  NAME=PATH of benchmarks or files in place of the run's own; their types are the NAMEs, and "overall" is the mean
                over all questions. num_questions: of each, default all.
    """
    if not questions and not config.eval.data:
        raise ConfigError("eval.data lists no source: this run has no held-out questions; name benchmarks as NAME=PATH")
    sources: dict[str | None, tuple[Dataset, int]]
    if questions:
        sources = {name: (samples, tokens) for name, (_, samples, tokens) in open_all(questions, None).items()}
    else:
        sources = {None: (open_sources(config.eval.data, config.seed), config.eval.max_new_tokens)}
    model, template = build_model(config)
    model.eval().to(place.device)
    stage = config.stages[0]
    set_position_mode(model, config, stage)
    results = {}
    for cap in caps:
        capped = dataclasses.replace(
            stage,
            resolution=None,
            max_visual_tokens=cap,
            min_visual_tokens=min(stage.min_visual_tokens, cap),
            forward_visual_tokens=None,
        )
        encoder = sample_encoder(model, template, config, capped)
        predictions: list[Prediction] = []
        skipped: list[str] = []
        for name, (samples, answer_tokens) in sources.items():
            count = min(num_questions or len(samples), len(samples))
            with place.autocast():
                answered, unasked = answer_questions(
                    model,
                    samples,
                    encoder,
                    indices=range(count),
                    world=place.world,
                    metric=config.eval.metric,
                    max_new_tokens=answer_tokens,
                    batch_size=config.eval.batch_size,
                    device=place.device,
                )
            predictions += [p if name is None else dataclasses.replace(p, question_type=name) for p in answered]
            skipped += unasked
        results[cap] = scores_by_type(predictions)
        if not results[cap]:
            raise ConfigError(f"no question could be asked at {cap} visual tokens; the first: {skipped[:1]}")
        if place.world.is_main:
            for message in skipped:
                print(f"skipped {message}", file=sys.stderr)
            print(f"{cap} visual tokens: {100 * results[cap][OVERALL]['score']:.1f}%", file=sys.stderr)
    return results


def write_sweep(results: dict[int, dict[str, dict[str, Any]]], folder: Path) -> None:
    """folder/table.json, a row per question type and a column per cap, and folder/sweep.png."""
    folder.mkdir(parents=True, exist_ok=True)
    types = all_types(results.values())
    rows = [[name, *(percent(scores, name) for scores in results.values())] for name in types]
    counts = [scores[OVERALL]["count"] for scores in results.values()]
    text = (
        f"Score in per cent on {max(counts)} held-out questions at native resolution, against the cap on visual tokens per "
        "question."
    )
    if min(counts) < max(counts):  # more pictures than a cap has tokens: means over fewer questions do not compare
        asked = ", ".join(f"{count} at {cap}" for cap, count in zip(results, counts) if count < max(counts))
        text += f" Fewer could be asked at some caps, so rows do not compare there: {asked}."
    table = dict(text=text, header=["visual tokens at most", *map(str, results)], rows=rows, total=True)
    (folder / "table.json").write_text(json.dumps(table, indent=1))

    figure, ax = plt.subplots(figsize=(8, 4.6))
    shades = plt.get_cmap("tab20")(range(20))  # pairs of a dark and a light one
    colours = [*shades[::2], *shades[1::2]]
    for number, name in enumerate(sorted(types, key=lambda name: -types[name]["score"])):  # the legend in the lines' order
        values = [100 * scores[name]["score"] if name in scores else math.nan for scores in results.values()]
        strong = name == OVERALL
        style = dict(color="black", linewidth=2.4, zorder=3) if strong else dict(color=colours[number % 20], linewidth=1.1)
        ax.plot(list(results), values, marker="osD^v"[number % 5], markersize=5, label=plain_text(name), **style)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(results), [str(cap) for cap in results])
    ax.set_xlabel("visual tokens per question at most")
    ax.set_ylabel("held-out score (%)")
    ax.set_ylim(0, 100)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(folder / "sweep.png", dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, for example runs/tiny")
    parser.add_argument("questions", nargs="*", metavar="NAME=PATH", help="benchmarks or files (default: the run's questions)")
    default = " ".join(map(str, CAPS))
    parser.add_argument("--caps", type=positive_int, nargs="+", default=CAPS, metavar="N", help=f"default: {default}")
    parser.add_argument("--stage", help="whose models to use (default: the last)")
    parser.add_argument("--count", type=positive_int, help="use the first questions only, of each source")
    add_place_options(parser)
    options = parser.parse_args(arguments)
    try:
        place = place_of(options)
        config = trained_config(options.run, options.stage)
        results = sweep(config, sorted(options.caps), options.count, questions=options.questions, place=place)
    except ConfigError as error:
        parser.error(str(error))
    if place.world.is_main:
        write_sweep(results, options.run / "sweep")
        print(options.run / "sweep" / "table.json")
    stop_world(place.world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
