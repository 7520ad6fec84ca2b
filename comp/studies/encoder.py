"""What a run did to its vision tower: `python -m comp.studies.encoder RUN [--stages STAGE ...] [--towers PATH ...]`.

Measured on the frozen tower, before and after: which mark lies in which patch, at native size and at caps on visual tokens
(comp.eval.patches; CoMP's Figure 3 for the tower); which page a text belongs to (comp.eval.retrieval); and what the tower is
worth to a language model that learns to read it (comp.studies.readers; the paper's Table 2). Writes RUN/encoder/{table.json,
encoder.png}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..build import build_model
from ..cli import positive_int
from ..config import Config, ConfigError
from ..eval.patches import NATIVE, TEST_PAGES, mean_average_precision, page_draws, probe_tower
from ..eval.retrieval import CANDIDATES, Encode, retrieval_by_adapter, retrieval_by_tower
from ..log import table
from ..model import VisionEncoder
from ..runs import encoders_of, run_config
from .readers import STEPS, check_readers, reading_loss

CAPS = (8, 16, 32, 64, NATIVE)
GUESS = sum(1 / rank for rank in range(1, CANDIDATES + 1)) / CANDIDATES
"""Mean reciprocal rank of a guess."""


@dataclass
class TowerScores:
    """Measures of one tower; scores in [0, 1]. Fields that were not measured are None."""

    patches: dict[int, float]
    """Cap on visual tokens -> mean average precision of the marks."""
    retrieval_tower: float
    retrieval_adapter: float | None
    reading_loss: float | None
    """Nats per token."""
    patch_draws: Tensor
    """Scores at native size of the same draws of pages for every tower, for the error of a change."""
    tower_ranks: Tensor
    """Reciprocal ranks of the candidates, for the same."""

    def record(self) -> dict[str, Any]:
        """The figures alone, for JSON."""
        values = asdict(self)
        del values["patch_draws"], values["tower_ranks"]
        return values


def measure_tower(
    encoder: VisionEncoder, encode: Encode, embeddings: Tensor, *, caps: Sequence[int] = CAPS, loss: float | None = None
) -> TowerScores:
    """All measures of one tower but the reading loss, which is handed in.

    encode, embeddings:  text -> token ids, and the word embeddings [V, E] that texts are made of.
    """
    patches, draws = {}, torch.empty(0)
    for cap in caps:
        scores, test = probe_tower(encoder, cap)
        patches[cap] = mean_average_precision(scores, test).item()
        if cap == max(caps):
            draws = mean_average_precision(scores, test, page_draws(TEST_PAGES))
    ranks = retrieval_by_tower(encoder, encode, embeddings)
    adapter = encoder.adapter
    by_adapter = None
    if adapter is not None and adapter.language_width == embeddings.shape[1]:
        by_adapter = retrieval_by_adapter(encoder, adapter, encode, embeddings).mean().item()
    return TowerScores(
        patches=patches,
        retrieval_tower=ranks.mean().item(),
        retrieval_adapter=by_adapter,
        reading_loss=loss,
        patch_draws=draws,
        tower_ranks=ranks,
    )


def measure_towers(
    config: Config, towers: Iterable[tuple[str, VisionEncoder]], *, reading_steps: int = STEPS, seeds: Sequence[int] = (0,)
) -> dict[str, TowerScores]:
    """Scores by label. The texts are tokenised and embedded by the language model that `config` starts from.

    reading_steps:  of the reading loss; 0 leaves it out, as a configuration without held-out questions does.
    seeds:          of the readers; their mean counts.
    """
    model, template = build_model(config)
    embeddings = model.prototypes("embed_tokens").clone()
    del model
    found = {}
    for label, encoder in towers:
        loss = None
        if reading_steps and config.eval.data:
            loss = mean(reading_loss(config, encoder, steps=reading_steps, seed=seed) for seed in seeds)
        found[label] = measure_tower(encoder, template.encode_text, embeddings, loss=loss)
    return found


# --- results -----------------------------------------------------------------------------------------------------------------


def rows_of(found: dict[str, TowerScores]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table: a row per measure, a column per tower, and the change of the last against the first."""
    towers = list(found.values())
    first, last = towers[0], towers[-1]
    rows = []
    for cap in sorted(first.patches, reverse=True):
        name = "marks by patch, native size, mAP %" if cap == max(first.patches) else f"the same, at most {cap} visual tokens"
        error = (last.patch_draws - first.patch_draws).std().item() if cap == max(first.patches) else None
        rows.append(_row(name, [tower.patches[cap] for tower in towers], 100, 1, error))
    error = (last.tower_ranks - first.tower_ranks).std().item() / len(first.tower_ranks) ** 0.5
    rows.append(_row("text of the page by the tower, MRR %", [tower.retrieval_tower for tower in towers], 100, 1, error))
    rows.append(_row("the same by its visual tokens", [tower.retrieval_adapter for tower in towers], 100, 1))
    if any(tower.reading_loss is not None for tower in towers):
        rows.append(_row("answers read off the frozen tower, nats", [tower.reading_loss for tower in towers], 1, 3))
    return ["frozen tower", *found, "change"], rows


def _row(name: str, values: Sequence[float | None], factor: float, digits: int, error: float | None = None) -> list[str]:
    cells = ["-" if value is None else f"{factor * value:.{digits}f}" for value in values]
    change = "-"
    if len(values) > 1 and values[0] is not None and values[-1] is not None:
        change = f"{factor * (values[-1] - values[0]):+.{digits}f}"
        change += "" if error is None else f" ± {factor * error:.{digits}f}"
    return [name, *cells, change]


def encoder_table(found: dict[str, TowerScores]) -> str:
    """The table as text for the terminal."""
    return table(*rows_of(found))


def write_encoder(found: dict[str, TowerScores], folder: Path) -> None:
    """folder/table.json, which the report page shows, and folder/encoder.png."""
    folder.mkdir(parents=True, exist_ok=True)
    header, rows = rows_of(found)
    text = (
        "The tower frozen, before and after: which mark lies in which patch (linear probe, held-out scans and tables), which "
        f"of {CANDIDATES} texts a page has (mean reciprocal rank; a guess gives {100 * GUESS:.1f}), and the held-out loss of a "
        "new adapter and language model that learn to read the tower. Change ± standard error over pages."
    )
    scores = {label: tower.record() for label, tower in found.items()}
    (folder / "table.json").write_text(json.dumps(dict(text=text, header=header, rows=rows, scores=scores), indent=1))
    draw(found, folder / "encoder.png")


def draw(found: dict[str, TowerScores], path: Path) -> None:
    """Precision by patch against the cap, and retrieval, for every tower."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(2, 1))
    colours = [plt.get_cmap("viridis")(0.9 * i / max(1, len(found) - 1)) for i in range(len(found))]
    for colour, (label, tower) in zip(colours, found.items()):
        caps = sorted(tower.patches)
        left.plot(caps, [100 * tower.patches[cap] for cap in caps], "o-", color=colour, label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(caps, [*map(str, caps[:-1]), "native"])
    left.set_xlabel("visual tokens of a page, at most")
    left.set_ylabel("marks by patch, mAP (%)")
    left.legend(fontsize=9)
    for number, (colour, tower) in enumerate(zip(colours, found.values())):
        right.bar(number, 100 * tower.retrieval_tower, color=colour)
    right.axhline(100 * GUESS, color="black", linewidth=0.8, linestyle="--")
    right.set_xticks(range(len(found)), list(found))
    right.set_ylabel("text of the page by the tower, MRR (%)")
    for ax in (left, right):
        ax.set_ylim(bottom=0)
        ax.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check_measures(config: Config) -> None:
    """ConfigError where `measure_run` could not do at the end of a run what its configuration asks for."""
    if config.eval.encoder and config.eval.reading_steps and config.eval.data:
        try:
            check_readers(config)
        except ConfigError as error:
            raise ConfigError(f"{error}; eval.reading_steps=0 measures the rest") from None


def measure_run(config: Config, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Towers of the stages that `config.eval.encoder` names, beside the start: files in RUN/encoder, and the table for the
    summary of the run; nothing where it names none."""
    if not config.eval.encoder:
        return {}
    say("measuring the towers: before, " + ", ".join(config.eval.encoder))
    found = measure_towers(config, encoders_of(folder, config.eval.encoder), reading_steps=config.eval.reading_steps)
    write_encoder(found, folder / "encoder")
    header, rows = rows_of(found)
    return dict(encoder=dict(header=header, rows=rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, for example runs/tiny")
    parser.add_argument(
        "--stages", nargs="+", metavar="STAGE", help="whose towers to compare with the start (default: the last)"
    )
    parser.add_argument("--towers", nargs="+", metavar="PATH", default=[], help="folders of further towers, or hub ids")
    parser.add_argument(
        "--reading-steps", type=int, default=STEPS, help=f"of the reading loss; 0: leave it out (default: {STEPS})"
    )
    parser.add_argument("--seeds", type=positive_int, default=1, help="readers per tower (default: 1)")
    options = parser.parse_args(arguments)
    try:
        config = run_config(options.run)
        towers = list(encoders_of(options.run, options.stages))
        towers[1:1] = [(path, VisionEncoder.from_pretrained(path).float().eval()) for path in options.towers]
        found = measure_towers(config, towers, reading_steps=options.reading_steps, seeds=range(options.seeds))
    except ConfigError as error:
        parser.error(str(error))
    write_encoder(found, options.run / "encoder")
    print(encoder_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
