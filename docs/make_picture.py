"""Draws docs/assets/operators.svg, the picture of the first page, from the operators: `python docs/make_picture.py`"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from comp_kernels import axial_freqs, rope_attention, rope_tables, sinkhorn

OUT = Path(__file__).parent / "assets" / "operators.svg"
GRIDS = [(3, 4), (2, 3), (4, 2)]  # rows x columns of patches of three images
COLOURS = ["#3f51b5", "#00897b", "#c2540a"]
INK, FAINT = "#333333", "#bbbbbb"
WORDS = ["dog", "grass", "ball", "sky", "the", "car", "tree", "red"]


def attention_weights() -> torch.Tensor:
    """[T, T]: with q = k = 1 a weight depends on nothing but the distance of two patches, row and column."""
    positions = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in GRIDS])
    bounds = torch.tensor([0, *(h * w for h, w in GRIDS)]).cumsum(0)
    count, width = int(bounds[-1]), 32
    cos, sin = rope_tables(positions, axial_freqs(width))
    ones, unit = torch.ones(count, 1, width), torch.eye(count, width)[:, None]
    return rope_attention(ones, ones, unit, cos, sin, bounds, scale=0.5)[:, 0, :count]  # values e_j: out_i holds the weights


def draw_images(axes: Axes) -> None:
    """Three images as grids of patches, and the packed row that their patches make."""
    left = 0.0
    for (rows, columns), colour in zip(GRIDS, COLOURS):
        for row in range(rows):
            for column in range(columns):
                axes.add_patch(Rectangle((left + column, 6.2 - row), 0.9, 0.9, color=colour, alpha=0.35 + 0.5 * row / rows))
        left += columns + 1.5
    place, step = 0.0, 0.44
    for (rows, columns), colour in zip(GRIDS, COLOURS):
        begin = place
        for patch in range(rows * columns):
            axes.add_patch(Rectangle((place, 0.6), step * 0.9, 0.9, color=colour, alpha=0.35 + 0.5 * (patch // columns) / rows))
            place += step
        axes.plot([begin, place - 0.04], [0.25, 0.25], color=colour, lw=2)
    axes.add_patch(FancyArrowPatch((5.7, 2.9), (5.7, 1.8), arrowstyle="-|>", mutation_scale=12, color=INK))
    axes.set(xlim=(-0.2, 12), ylim=(0, 7.4), aspect="equal")
    axes.axis("off")


def draw_matrix(axes: Axes, values: torch.Tensor, title: str, rows: str, columns: str) -> None:
    axes.imshow(values, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize=10, color=INK)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(columns, fontsize=9, color=INK)
    axes.set_ylabel(rows, fontsize=9, color=INK)
    axes.spines[:].set_color(FAINT)


def draw_sums(axes: Axes, plan: torch.Tensor) -> None:
    axes.bar(range(plan.shape[1]), plan.sum(0), color="#00897b", width=0.8)
    axes.axhline(plan.shape[0] / plan.shape[1], color=INK, lw=0.8, ls=":")
    axes.set(xlim=(-0.5, plan.shape[1] - 0.5), ylim=(0, 4.6), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_words(axes: Axes, probabilities: torch.Tensor, title: str, colour: str, named: bool) -> None:
    axes.bar(range(len(WORDS)), probabilities, color=colour, width=0.7)
    axes.set_title(title, fontsize=10, color=INK)
    axes.set(ylim=(0, 0.7), yticks=[], xticks=range(len(WORDS)))
    axes.set_xticklabels(WORDS if named else [], fontsize=9, rotation=40, color=INK)
    axes.tick_params(length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def main() -> None:
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "operators", "font.family": "sans-serif"})
    figure = plt.figure(figsize=(12.4, 4.9))
    for place, (name, line) in zip(
        (0.165, 0.5, 0.835),
        (
            ("rope_attention", "each patch attends to the patches of its own image"),
            ("sinkhorn", "assignments in which every column gets its share"),
            ("alignment_loss", "the image predicts the words that the text is about"),
        ),
    ):
        figure.text(place, 0.955, name, ha="center", fontsize=14, family="monospace", color=INK)
        figure.text(place, 0.905, line, ha="center", fontsize=10.5, color=INK)

    draw_images(figure.add_axes((0.015, 0.47, 0.30, 0.40)))
    figure.text(0.165, 0.455, "images of any size, packed: no padding, no mask", ha="center", fontsize=9, color=INK)
    draw_matrix(figure.add_axes((0.085, 0.06, 0.16, 0.355)), attention_weights(), "", "queries", "keys")

    scores = torch.randn(12, 6, generator=torch.Generator().manual_seed(3)) + torch.tensor([1.2, 0.4, 0.0, 0.0, -0.4, -1.0])
    for left, title, plan in (
        (0.375, "softmax of the rows", scores.softmax(-1)),
        (0.535, "sinkhorn", sinkhorn(scores, epsilon=1.0, num_iters=20)),
    ):
        draw_matrix(figure.add_axes((left, 0.06, 0.125, 0.56)), plan, "", "samples" if left < 0.4 else "", "prototypes")
        draw_sums(figure.add_axes((left, 0.63, 0.125, 0.17)), plan)
        figure.text(left + 0.0625, 0.835, title, ha="center", fontsize=10, color=INK)
    figure.text(0.367, 0.66, "column\nsums", ha="right", fontsize=9, color=INK)

    cosines = torch.tensor([0.32, 0.25, 0.28, 0.05, 0.12, 0.0, 0.08, 0.1])
    target, prediction = (cosines / 0.08).softmax(0), (cosines.roll(1) * 0.5 + cosines * 0.6).div(0.1).softmax(0)
    draw_words(figure.add_axes((0.70, 0.53, 0.27, 0.27)), target, "target, from the text", "#c2540a", named=False)
    draw_words(figure.add_axes((0.70, 0.16, 0.27, 0.27)), prediction, "prediction, from the image", "#3f51b5", named=True)
    figure.text(0.835, 0.035, "over the whole vocabulary of a language model", ha="center", fontsize=9, color=INK)
    figure.savefig(OUT, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
