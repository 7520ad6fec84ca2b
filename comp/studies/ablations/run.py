"""Ablations in small: `python -m comp.studies.ablations RUNDIR [--only NAME ...] [--seeds 0 1 2] [--jobs N]`.

Trains variants of one short schedule on the data of the recipe `tiny` and scores them on held-out questions; each variant
differs from the baseline in the fields of its row in `VARIANTS` and in nothing else. A finished run is kept, an interrupted one
goes on where it was; several processes may work in one RUNDIR. Results are lines of RUNDIR/results.jsonl, one per run; all of
them together become RUNDIR/ablations.{json, md, png} (comp.studies.ablations.table).
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...build import sample_encoder
from ...cli import positive_int
from ...config import CheckpointConfig, Config, EvalConfig
from ...config_io import apply_overrides, to_dict
from ...data.mixture import open_sources
from ...eval.patches import NATIVE
from ...eval.vqa import OVERALL, answer_loss, answer_questions, scores_by_type
from ...files import write_json
from ...log import read_records
from ...tiny.recipe import tiny
from ...train.checkpoint import PROGRESS
from ...train.trainer import StopRequested, Trainer
from ..encoder import measure_tower
from .table import BASELINE, METRICS, write_tables

NUM_QUESTIONS = 160
"""Held-out questions, 10 of each kind."""
CAPS = (16, NATIVE)
"""Visual tokens of a page in the probe of patches, at most."""
RESULTS = "results.jsonl"
CONTRASTIVE_TEMPERATURE = 0.07
"""Of InfoNCE in the literature (He et al. 2020, CLIP's start)."""
CONTRASTIVE_WEIGHT = 0.33
"""At which the contrastive loss pulls the adapter as hard as the baseline's loss does in the first step of Stage I."""
TOWER_RATE = tiny().stages[2].optim.lr_vision


@dataclass(frozen=True, slots=True)
class Variant:
    """Changes to the baseline, as `comp.config_io.apply_overrides` reads them. Stage 0 is I, stage 1 is II."""

    group: str
    label: str
    overrides: tuple[str, ...] = ()


ARMS, POSITIONS, ROPE_START = (
    "alignment loss (Table 5b)",
    "positions and resolution (Table 5a)",
    "start of RoPE (Table 4, rows 2 and 3)",
)
ORDER, RESOLUTION = "order of the position table", "stages.1.resolution=96"
OFF = "stages.*.alignment=null"
TOWER_TRAINS = ("stages.0.trainable=[vision, adapter]", f"stages.0.optim.lr_vision={TOWER_RATE}")

# In the order in which they run: whoever stops early has the main questions answered.
VARIANTS: dict[str, Variant] = {
    BASELINE: Variant("", "sinkhorn"),
    "align-off": Variant(ARMS, "no alignment loss", (OFF,)),
    "tower-frozen": Variant(ARMS, "no alignment loss, tower frozen in II", (OFF, "stages.1.trainable=[adapter, language]")),
    "align-softmax": Variant(ARMS, "softmax", ("stages.*.alignment.mode=softmax",)),
    "align-contrastive": Variant(
        ARMS,
        "contrastive, equal force",
        (
            "stages.*.alignment.mode=contrastive",
            f"stages.*.alignment.temperature={CONTRASTIVE_TEMPERATURE}",
            f"stages.*.alignment.weight={CONTRASTIVE_WEIGHT}",
        ),
    ),
    "align-paper": Variant(
        ARMS,
        "sinkhorn, the paper's 0.005 and weight",
        (
            "stages.*.alignment.epsilon=0.005",
            "stages.*.alignment.temperature=0.005",
            "stages.*.alignment.weight=0.05",
        ),
    ),
    "align-literal": Variant(ARMS, "literal (Eq. 9 in closed form)", ("stages.*.alignment.mode=literal",)),
    "align-released": Variant(ARMS, "released code", ("stages.*.alignment.mode=released",)),
    "align-uniform": Variant(ARMS, "sinkhorn, uniform prior", ("stages.*.alignment.prior=false",)),
    "align-learned": Variant(ARMS, "sinkhorn, learned prototypes", ("stages.*.alignment.prototype_source=learned",)),
    "table-native": Variant(POSITIONS, "table only, native", ("stages.1.rope=false",)),
    "rope-native": Variant(POSITIONS, "RoPE only, native", ("vision.pos_mode=rope",)),
    "crope-fixed": Variant(POSITIONS, "C-RoPE, 96 x 96", (RESOLUTION,)),
    "table-fixed": Variant(POSITIONS, "table only, 96 x 96", ("stages.1.rope=false", RESOLUTION)),
    "rope-fixed": Variant(POSITIONS, "RoPE only, 96 x 96", ("vision.pos_mode=rope", RESOLUTION)),
    "rope-from-I-tower": Variant(ROPE_START, "RoPE from I, tower trains in I", ("stages.0.rope=true", *TOWER_TRAINS)),
    "raster-crope": Variant(ORDER, "raster order, C-RoPE", ("vision.abs_pos_order=raster_legacy",)),
    "raster-table": Variant(ORDER, "raster order, table only", ("vision.abs_pos_order=raster_legacy", "stages.1.rope=false")),
    "rope-from-I": Variant(ROPE_START, "RoPE from I, tower frozen in I", ("stages.0.rope=true",)),
    "tower": Variant(ROPE_START, "RoPE from II, tower trains in I", TOWER_TRAINS),
}
MAIN_ARMS = tuple(VARIANTS)[:6]

PAIRS = (
    (BASELINE, "align-off"),
    ("align-off", "tower-frozen"),
    (BASELINE, "align-softmax"),
    (BASELINE, "align-contrastive"),
    (BASELINE, "align-paper"),
    ("align-contrastive", "align-off"),
    ("align-paper", "align-off"),
    ("crope-fixed", "table-fixed"),
    ("crope-fixed", "rope-fixed"),
    ("table-native", "table-fixed"),
    ("rope-native", "rope-fixed"),
    ("rope-from-I-tower", "tower"),
    ("raster-table", "table-native"),
    ("raster-crope", "raster-table"),
)
"""Comparisons that matter. The first, on the marks by patch and on retrieval, is the test that was fixed before any arm ran."""

Base = Callable[[int, Path], Config]
"""(seed, folder) -> the configuration that variants change."""


def baseline(seed: int, folder: Path) -> Config:
    """A shortened `tiny`: Stage I, then one native Stage II. The seed is that of data order and new adapter; seeds from 100 on
    chose the settings, those below compare."""
    recipe = tiny()
    one, _, two, _ = recipe.stages
    return dataclasses.replace(
        recipe,
        name=f"{BASELINE}-{seed}",
        output_dir=str(folder),
        seed=seed,
        stages=[
            dataclasses.replace(one, max_steps=80, batch_size=16),
            dataclasses.replace(two, name="II", max_steps=160, batch_size=16),
        ],
        eval=EvalConfig(),  # scored here, once, at the end
        checkpoint=CheckpointConfig(every_steps=100, keep=100),  # the one after Stage I stays: other variants start from it
        device="cpu",
        tensorboard=False,
    )


def configure(name: str, seed: int, folder: Path, base: Base = baseline) -> Config:
    """The configuration of a variant."""
    config = apply_overrides(base(seed, folder), VARIANTS[name].overrides)
    return dataclasses.replace(config, name=f"{name}-{seed}")


# --- one run ------------------------------------------------------------------------------------------------------------------


def stage_one_key(config: Config) -> dict[str, Any]:
    """Everything that the state after the first stage depends on: configurations with equal keys share that stage."""
    values = to_dict(config)
    one, two = values["stages"]
    # the word prior counts the answers of the last stage that has an alignment loss
    values["stages"] = [one, two["data"] if two["alignment"] else None]
    if not config.stages[0].rope:
        del values["vision"]["pos_mode"]
    del values["name"]
    return values


def start_after_stage_one(config: Config, others: Sequence[Config]) -> bool:
    """Let a run that has not begun continue from the checkpoint another one made at the end of an equal first stage.

    A resumed run repeats an unbroken one bit for bit, so this saves time and changes nothing. False: no such checkpoint.
    """
    target = Path(config.output_dir) / config.name
    key, checkpoint = stage_one_key(config), f"step-{config.stages[0].max_steps:08d}"
    for other in others:
        source = Path(other.output_dir) / other.name
        finished = source / "checkpoints" / checkpoint
        if source == target or not (finished / PROGRESS).is_file() or stage_one_key(other) != key:
            continue
        temporary = target.with_name(f".copying-{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(finished, temporary / "checkpoints" / checkpoint)
        for file in ("metrics.jsonl", "word_counts.npy"):  # the trainer cuts metrics.jsonl at the checkpoint
            if (source / file).is_file():
                shutil.copy(source / file, temporary)
        write_json(temporary / "config.json", to_dict(config))
        temporary.rename(target)
        return True
    return False


def train_and_score(config: Config, num_questions: int = NUM_QUESTIONS) -> dict[str, Any]:
    """Finish the run, answer held-out questions at the resolution of its last stage, and measure the frozen tower."""
    begun = time.process_time()
    trainer = Trainer(config, resume=True)
    embeddings = trainer.model.prototypes("embed_tokens").clone()  # those of the start: `run` loads what was learned since
    trainer.run()
    stage = config.stages[-1]
    data = tiny().eval.data
    data[0].arguments["size"] = num_questions
    held_out = open_sources(data, config.seed)
    encoder = sample_encoder(trainer.model, trainer.template, config, stage)
    every = range(len(held_out))
    predictions, skipped = answer_questions(
        trainer.model, held_out, encoder, indices=every, metric=config.eval.metric, max_new_tokens=8, batch_size=65
    )
    if skipped:
        raise RuntimeError(f"{config.name}: {len(skipped)} questions could not be asked, the first: {skipped[0]}")
    records = [r for r in read_records(trainer.folder / "metrics.jsonl", "train") if r["stage"] == stage.name]
    scores = scores_by_type(predictions)
    loss = answer_loss(trainer.model, (encoder.encode(held_out[i]) for i in every), encoder, batch_size=65)
    tower = measure_tower(trainer.model.encoder, trainer.template.encode_text, embeddings, caps=CAPS)
    return dict(
        patches=tower.patches[max(CAPS)],
        patches_few=tower.patches[min(CAPS)],
        retrieval_tower=tower.retrieval_tower,
        retrieval=tower.retrieval_adapter,
        accuracy=scores[OVERALL]["score"],
        loss=loss,
        by_type={name: scores[name]["score"] for name in scores if name != OVERALL},
        visual_tokens_per_image=sum(r["visual_tokens"] for r in records) / sum(r["images"] for r in records),
        cpu_seconds=round(time.process_time() - begun, 1),
    )


# --- all runs -----------------------------------------------------------------------------------------------------------------


def run_all(
    folder: Path, names: Sequence[str], seeds: Sequence[int], *, base: Base = baseline, num_questions: int = NUM_QUESTIONS
) -> None:
    """Every (variant, seed) that has no result yet and that no other process is working on, seed by seed."""
    torch.set_num_threads(1)  # results then do not depend on the machine's number of cores, and --jobs uses the others
    for seed in seeds:
        for name in names:
            with claimed(folder / "claims" / f"{name}-{seed}") as mine:
                if not mine or (name, seed) in {(run["variant"], run["seed"]) for run in read_results(folder)}:
                    continue
                config = configure(name, seed, folder, base)
                run = folder / config.name
                if not run.exists():
                    start_after_stage_one(config, [configure(other, seed, folder, base) for other in VARIANTS])
                result = train_and_score(config, num_questions)
                append_result(folder, dict(variant=name, seed=seed, **result))
                drop_weights(run, keep=f"step-{config.stages[0].max_steps:08d}")
                figures = ", ".join(f"{key} {result[key]:.4f}" for key in METRICS)
                print(f"{name} seed {seed}: {figures}; {result['cpu_seconds']:.0f} s", flush=True)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All finished runs, in the order in which they ended."""
    path = folder / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append_result(folder: Path, result: dict[str, Any]) -> None:
    """One line, whole or not at all for whoever reads meanwhile."""
    with (folder / RESULTS).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result) + "\n")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone holds `path`; the claim of a process that dies ends with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def drop_weights(run: Path, keep: str) -> None:
    """Delete what a scored run no longer needs: exported models, and checkpoints but the one that other variants start from."""
    shutil.rmtree(run / "models", ignore_errors=True)
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name != keep:
            shutil.rmtree(checkpoint)


def collect(folder: Path) -> dict[str, Any]:
    """All results so far, in the order of `VARIANTS`, with what is needed to read them."""
    runs, order = read_results(folder), list(VARIANTS)
    config = baseline(0, folder)
    return dict(
        schedule=[dict(stage=s.name, steps=s.max_steps, batch_size=s.batch_size) for s in config.stages],
        questions=NUM_QUESTIONS,
        variants={name: dataclasses.asdict(variant) for name, variant in VARIANTS.items()},
        pairs=PAIRS,
        runs=sorted(runs, key=lambda run: (order.index(run["variant"]), run["seed"])),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUNDIR", help="where runs and results go, for example runs/ablations")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=VARIANTS,
        default=MAIN_ARMS,
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)} (default: the first {len(MAIN_ARMS)})",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes, one thread each")
    options = parser.parse_args(arguments)
    command = [sys.executable, "-m", "comp.studies.ablations", str(options.folder), "--only", *options.only]
    command += ["--seeds", *map(str, options.seeds)]
    helpers = [subprocess.Popen(command) for _ in range(options.jobs - 1)]
    try:
        run_all(options.folder, options.only, options.seeds)
        failed = [helper.returncode for helper in helpers if helper.wait()]
    except StopRequested:
        print("stopped by a signal; the same command goes on from here", file=sys.stderr)
        return 1
    finally:
        for helper in helpers:  # those still at work where this process was stopped: they save themselves as it did
            helper.terminate()
    results = collect(options.folder)
    write_json(options.folder / "ablations.json", results)
    write_tables(results, options.folder)
    print(options.folder / "ablations.md")
    return 1 if failed else 0
