"""Pictures of a run from its metrics.jsonl: losses, learning rates, gradient norms, speed, held-out scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ..eval.vqa import all_types
from ..log import read_records

Records = Sequence[dict[str, Any]]
STYLES = {"vision": ("tab:blue", "-"), "adapter": ("tab:orange", "-"), "language": ("tab:green", "--")}


def plot_run(metrics: Path, folder: Path) -> list[Path]:
    """Draw every plot that the records of metrics.jsonl allow into `folder`; returns the files."""
    train, evaluations = read_records(metrics, "train"), read_records(metrics, "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if train:
        has_alignment = any("alignment_loss" in r for r in train)
        panels = [draw_token_loss, draw_alignment_loss] if has_alignment else [draw_token_loss]
        written.append(_figure(folder / "losses.png", train, panels))
        written.append(_figure(folder / "learning_rates.png", train, [draw_learning_rates]))
        written.append(_figure(folder / "gradient_norms.png", train, [draw_gradient_norms]))
        written.append(_figure(folder / "speed.png", train, [draw_images_per_second, draw_tokens_per_second]))
    if evaluations:
        written.append(plot_scores(folder / "scores.png", evaluations))
    return written


def plain_text(name: str) -> str:
    """For matplotlib, which reads what stands between two dollar signs as mathematics, and fails where it is none."""
    return name.replace("$", r"\$")


def _figure(path: Path, train: Records, panels: Sequence[Callable[[Axes, Records], None]]) -> Path:
    """One panel above the other over the steps of all stages, stages shaded in turn and named."""
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 1.2 + 3 * len(panels)), sharex=True, squeeze=False)
    for ax, draw in zip(axes[:, 0], panels):
        draw(ax, train)
        _mark_stages(ax, train)
        ax.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("optimiser step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _mark_stages(ax: Axes, train: Records) -> None:
    names = list(dict.fromkeys(r["stage"] for r in train))
    for number, name in enumerate(names):
        steps = [r["step"] for r in train if r["stage"] == name]
        if number % 2:
            ax.axvspan(steps[0] - 0.5, steps[-1] + 0.5, color="black", alpha=0.05, linewidth=0)
        centre = (steps[0] + steps[-1]) / 2
        ax.annotate(plain_text(name), (centre, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=9)


def draw_token_loss(ax: Axes, train: Records) -> None:
    _draw_loss(ax, train, "token_loss", "tab:blue")
    ax.set_ylabel("next-token loss (nats)")


def draw_alignment_loss(ax: Axes, train: Records) -> None:
    _draw_loss(ax, train, "alignment_loss", "tab:red")
    ax.set_ylabel("alignment loss (nats)")


def _draw_loss(ax: Axes, train: Records, key: str, colour: str) -> None:
    """Faint raw values, and their running mean within every stage."""
    for name in dict.fromkeys(r["stage"] for r in train):
        points = [(r["step"], r[key]) for r in train if r["stage"] == name and key in r]
        if points:
            steps, values = zip(*points)
            ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(steps, running_mean(values), color=colour, linewidth=1.6)


def running_mean(values: Sequence[float], reach: int = 10) -> np.ndarray:
    """Mean of every value and of those up to `reach` before and after it, which does not lag behind."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def draw_learning_rates(ax: Axes, train: Records) -> None:
    _draw_parts(ax, train, "lr")
    ax.set_ylabel("learning rate")


def draw_gradient_norms(ax: Axes, train: Records) -> None:
    _draw_parts(ax, train, "grad_norm")
    ax.set_ylabel("gradient norm before clipping")


def _draw_parts(ax: Axes, train: Records, key: str) -> None:
    """One line per part of the model, on a log scale; gaps where a part is frozen."""
    for part, (colour, style) in STYLES.items():
        values = [r[key].get(part) or np.nan for r in train]
        if not np.all(np.isnan(values)):
            ax.plot([r["step"] for r in train], values, style, color=colour, label=part, linewidth=1.2)
    ax.set_yscale("log")
    ax.legend(loc="best", fontsize=9)


def draw_images_per_second(ax: Axes, train: Records) -> None:
    ax.plot([r["step"] for r in train], [r["images_per_s"] for r in train], color="tab:purple", linewidth=1)
    ax.set_ylabel("images per second")


def draw_tokens_per_second(ax: Axes, train: Records) -> None:
    ax.plot([r["step"] for r in train], [r["tokens_per_s"] for r in train], color="tab:gray", linewidth=1)
    ax.set_ylabel("tokens per second")


def plot_scores(path: Path, evaluations: Records) -> Path:
    """Bars per question type, one colour per evaluation, in order of time."""
    types = list(all_types(record["scores"] for record in evaluations))
    figure, ax = plt.subplots(figsize=(min(11.0, max(6.0, 1.6 * len(types))), 4))  # wider would be shrunk until unreadable
    width = 0.8 / len(evaluations)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(evaluations)))
    for number, record in enumerate(evaluations):
        places = np.arange(len(types)) + (number - (len(evaluations) - 1) / 2) * width
        values = [100 * record["scores"][name]["score"] if name in record["scores"] else np.nan for name in types]
        ax.bar(places, values, width, label=plain_text(record["label"]), color=colours[number])
    ax.set_xticks(np.arange(len(types)), [plain_text(name) for name in types], rotation=30, ha="right")
    ax.set_ylabel("held-out score (%)")
    ax.set_ylim(0, 100)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
