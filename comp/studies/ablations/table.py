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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BASELINE = "baseline"
METRICS = {"accuracy": ("accuracy (%)", 100.0, 1), "loss": ("loss (nats per token)", 1.0, 4)}
"""Field of a run -> its name, the factor it is shown with, and its digits."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One variant minus another of every common seed, and what follows."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return mean(self.by_seed.values())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, from the spread of the differences; None for a single seed."""
        return stdev(self.by_seed.values()) / math.sqrt(len(self.by_seed)) if len(self.by_seed) > 1 else None


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


def pooled_standard_error(values: dict[str, dict[int, float]]) -> tuple[float, int] | None:
    """Standard error of a difference of two variants' means, and its degrees of freedom, from all variants at once.

    Three differences say little about their own spread. The residuals of value = variant + seed + noise, over the variants that
    ran with all seeds of the baseline, have (variants - 1) * (seeds - 1) degrees of freedom. None where there are too few.
    """
    seeds = sorted(values.get(BASELINE, {}))
    rows = [[by_seed[s] for s in seeds] for by_seed in values.values() if set(seeds) <= set(by_seed)]
    if len(seeds) < 2 or len(rows) < 2:
        return None
    table = np.array(rows)
    noise = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = (len(rows) - 1) * (len(seeds) - 1)
    return math.sqrt(2 / len(seeds) * float((noise**2).sum()) / freedom), freedom


def write_tables(results: dict[str, Any], folder: Path) -> None:
    """folder/ablations.md and folder/ablations.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablations.md").write_text(markdown(results))
    draw(results, folder / "ablations.png")


def markdown(results: dict[str, Any]) -> str:
    """One table per group of variants, the baseline on top of each; one of other pairs; and the pooled error below."""
    values = {metric: values_by_variant(results, metric) for metric in METRICS}
    ran = [name for name in values["loss"] if name != BASELINE]
    blocks = []
    for group in dict.fromkeys(results["variants"][name]["group"] for name in ran):
        members = [name for name in ran if results["variants"][name]["group"] == group]
        rows = [_row(results, values, name) for name in (BASELINE, *members) if name in values["loss"]]
        header = ["variant", "changes", "seeds", "visual tokens per image"]
        for name, _, _ in METRICS.values():
            header += [name, "against the baseline"]
        blocks.append(_table(group, [header, ["---"] * 4 + ["---:"] * 4, *rows]))
    pairs = [row for pair in results["pairs"] if (row := _pair_row(results, values, *pair))]
    if pairs:
        header = ["variant", "minus", "seeds", *(name for name, _, _ in METRICS.values())]
        blocks.append(_table("other pairs", [header, ["---"] * 3 + ["---:"] * 2, *pairs]))
    return "\n".join([*blocks, _footnote(values)])


def _table(title: str, lines: list[list[str]]) -> str:
    return f"**{title[0].upper()}{title[1:]}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _pair_row(
    results: dict[str, Any], values: dict[str, dict[str, dict[int, float]]], name: str, against: str
) -> list[str] | None:
    found = {metric: difference(values[metric], name, against) for metric in METRICS}
    if None in found.values():
        return None
    labels = [results["variants"][variant]["label"] for variant in (name, against)]
    seeds = str(len(found["loss"].by_seed))
    return [*labels, seeds, *(_difference(found[metric], digits) for metric, (_, _, digits) in METRICS.items())]


def _row(results: dict[str, Any], values: dict[str, dict[str, dict[int, float]]], name: str) -> list[str]:
    variant = results["variants"][name]
    runs = [run for run in results["runs"] if run["variant"] == name]
    changes = " ".join(f"`{override}`" for override in variant["overrides"])
    cells = [variant["label"], changes, str(len(runs)), f"{mean(run['visual_tokens_per_image'] for run in runs):.1f}"]
    for metric, (_, _, digits) in METRICS.items():
        cells += [
            _mean_and_spread(values[metric][name].values(), digits),
            _difference(difference(values[metric], name), digits),
        ]
    return cells


def _mean_and_spread(numbers: Any, digits: int) -> str:
    numbers = list(numbers)
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}"


def _difference(found: Difference | None, digits: int) -> str:
    if found is None:
        return ""
    error = f" ({found.standard_error:.{digits}f})" if found.standard_error is not None else ""
    return f"{found.mean:+.{digits}f}{error}"


def _footnote(values: dict[str, dict[str, dict[int, float]]]) -> str:
    """How to read the columns, with the pooled errors."""
    text = (
        "Mean ± standard deviation over seeds; then the mean difference to the baseline of the same seed and, in brackets, its "
        "standard error from these differences alone."
    )
    for metric, (name, _, digits) in METRICS.items():
        pooled = pooled_standard_error(values[metric])
        if pooled is not None:
            text += f" Pooled over all variants, the standard error of a difference in {name} is {pooled[0]:.{digits}f}"
            text += f" ({pooled[1]} degrees of freedom)."
    return text + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Differences to the baseline, a row per variant: dots are seeds, bars two pooled standard errors around the mean."""
    values = {metric: values_by_variant(results, metric) for metric in METRICS}
    names = [name for name in values["loss"] if difference(values["loss"], name) is not None]
    groups = list(dict.fromkeys(results["variants"][name]["group"] for name in names))
    names.sort(key=lambda name: groups.index(results["variants"][name]["group"]))
    figure, axes = plt.subplots(1, len(METRICS), figsize=(11, 1.2 + 0.34 * max(1, len(names))), sharey=True)
    for ax, (metric, (label, _, _)) in zip(axes, METRICS.items()):
        pooled = pooled_standard_error(values[metric])
        for place, name in enumerate(names):
            found = difference(values[metric], name)
            colour = f"C{groups.index(results['variants'][name]['group'])}"
            bar = 2 * pooled[0] if pooled is not None else None
            ax.errorbar(found.mean, place, xerr=bar, fmt="D", color=colour, markersize=6, capsize=3, linewidth=1.5)
            ax.plot(list(found.by_seed.values()), [place] * len(found.by_seed), "o", color=colour, alpha=0.45, markersize=4)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_xlabel(f"difference to the baseline, {label}")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [results["variants"][name]["label"] for name in names], fontsize=9)
    for tick, name in zip(axes[0].get_yticklabels(), names):
        tick.set_color(f"C{groups.index(results['variants'][name]['group'])}")
    axes[0].invert_yaxis()
    for ax, better in zip(axes, ("better to the right", "better to the left")):
        ax.set_title(better, fontsize=9)
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
