"""Tables and plot of ablations from their JSON: `python -m comp.studies.ablations.table RESULTS.json [--folder FOLDER]`.

Every variant ran with the same seeds as the baseline, so differences are taken seed by seed. Writes ablations.md and
ablations.png beside the JSON, or into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import t

BASELINE = "baseline"
METRICS = {
    "patches": ("marks by patch (mAP %)", 100.0, 1),
    "patches_few": ("the same at 16 tokens", 100.0, 1),
    "retrieval_tower": ("text by the tower (MRR %)", 100.0, 1),
    "retrieval": ("text by visual tokens (MRR %)", 100.0, 1),
    "loss": ("answer loss (nats)", 1.0, 3),
    "accuracy": ("accuracy (%)", 100.0, 1),
}
"""Field of a run -> its name, the factor it is shown with, and its digits."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One variant minus another of every common seed, and what follows."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return mean(self.by_seed.values())

    @property
    def half_width(self) -> float | None:
        """Of the 95% interval around the mean, Student's t over the seeds; None for a single seed."""
        count = len(self.by_seed)
        return float(t.ppf(0.975, count - 1)) * stdev(self.by_seed.values()) / math.sqrt(count) if count > 1 else None


class Comparison(NamedTuple):
    """Two variants that have a common seed."""

    name: str
    against: str
    by_metric: dict[str, Difference]


def values_by_variant(results: dict[str, Any], metric: str) -> dict[str, dict[int, float]]:
    """variant -> seed -> value, in the order of results["variants"], in the units of the table."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for run in results["runs"]:
        values[run["variant"]][run["seed"]] = METRICS[metric][1] * run[metric]
    return {name: values[name] for name in results["variants"] if name in values}


def difference(values: dict[str, dict[int, float]], name: str, against: str = BASELINE) -> Difference | None:
    """None between a variant and itself, and where no seed is common."""
    base = values.get(against, {})
    common = {seed: value - base[seed] for seed, value in values.get(name, {}).items() if seed in base}
    return Difference(common) if common and name != against else None


def write_tables(results: dict[str, Any], folder: Path) -> None:
    """folder/ablations.md and, where a pair has a common seed, folder/ablations.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablations.md").write_text(markdown(results))
    if compared(results):
        draw(results, folder / "ablations.png")


def markdown(results: dict[str, Any]) -> str:
    """A table of means per group of variants, the baseline on top of each, and one of the comparisons that were asked for."""
    values = {metric: values_by_variant(results, metric) for metric in METRICS}
    ran = [name for name in values["loss"] if name != BASELINE]
    blocks = []
    for group in dict.fromkeys(results["variants"][name]["group"] for name in ran):
        members = [name for name in ran if results["variants"][name]["group"] == group]
        rows = [_row(results, values, name) for name in (BASELINE, *members) if name in values["loss"]]
        header = ["variant", "changes", "seeds", *(name for name, _, _ in METRICS.values())]
        blocks.append(_table(group, [header, ["---"] * 3 + ["---:"] * len(METRICS), *rows]))
    pairs = [_comparison_row(results, comparison) for comparison in compared(results)]
    if pairs:
        header = ["variant", "minus", "seeds", *(name for name, _, _ in METRICS.values())]
        blocks.append(_table("differences", [header, ["---"] * 3 + ["---:"] * len(METRICS), *pairs]))
    return "\n".join([*blocks, FOOTNOTE])


FOOTNOTE = (
    "Mean ± standard deviation over seeds. A difference is taken seed by seed; behind ± stands half the 95% interval "
    "(Student's t over the seeds).\n"
)


def compared(results: dict[str, Any]) -> list[Comparison]:
    """The pairs that were asked for, as far as they have a common seed."""
    values = {metric: values_by_variant(results, metric) for metric in METRICS}
    found = []
    for name, against in results["pairs"]:
        differences = {metric: difference(values[metric], name, against) for metric in METRICS}
        if by_metric := {metric: one for metric, one in differences.items() if one is not None}:
            found.append(Comparison(name, against, by_metric))
    return found


def _table(title: str, lines: list[list[str]]) -> str:
    return f"**{title[0].upper()}{title[1:]}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _comparison_row(results: dict[str, Any], comparison: Comparison) -> list[str]:
    name, against, found = comparison
    labels = [results["variants"][variant]["label"] for variant in (name, against)]
    seeds = str(len(found["loss"].by_seed))
    return [*labels, seeds, *(_difference(found[metric], digits) for metric, (_, _, digits) in METRICS.items())]


def _row(results: dict[str, Any], values: dict[str, dict[str, dict[int, float]]], name: str) -> list[str]:
    variant = results["variants"][name]
    changes = " ".join(f"`{override}`" for override in variant["overrides"])
    cells = [variant["label"], changes, str(len(values["loss"][name]))]
    return cells + [_mean_and_spread(values[metric][name].values(), digits) for metric, (_, _, digits) in METRICS.items()]


def _mean_and_spread(numbers: Iterable[float], digits: int) -> str:
    numbers = list(numbers)
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}"


def _difference(found: Difference, digits: int) -> str:
    error = f" ± {found.half_width:.{digits}f}" if found.half_width is not None else ""
    return f"{found.mean:+.{digits}f}{error}"


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel per metric, a row per comparison: dots are seeds, bars 95% intervals of the mean."""
    pairs = compared(results)
    figure, axes = plt.subplots(1, len(METRICS), figsize=(14, 1.4 + 0.34 * len(pairs)), sharey=True)
    for ax, (metric, (label, _, _)) in zip(axes, METRICS.items()):
        for place, pair in enumerate(pairs):
            found = pair.by_metric[metric]
            ax.errorbar(found.mean, place, xerr=found.half_width, fmt="D", color=f"C{place % 10}", markersize=5, capsize=3)
            ax.plot(list(found.by_seed.values()), [place] * len(found.by_seed), "o", color="grey", alpha=0.5, markersize=3)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_xlabel(label, fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(axis="x", alpha=0.3)
    names = [" − ".join(results["variants"][variant]["label"] for variant in (p.name, p.against)) for p in pairs]
    axes[0].set_yticks(range(len(pairs)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="as comp.studies.ablations writes it")
    parser.add_argument("--folder", type=Path, help="default: the folder of RESULTS.json")
    options = parser.parse_args(arguments)
    folder = options.folder or options.results.parent
    write_tables(json.loads(options.results.read_text()), folder)
    print(folder / "ablations.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
