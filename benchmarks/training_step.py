"""An optimiser step of the trainer on rows of mixed lengths: packed and padded rows, and another checkout of this project.

    python -m benchmarks.training_step [--arms packed bf16] [--peer FOLDER] [--threads 2] [--layers 30] [--samples 16]
                                       [--so400m 0] [--sides 2 16] [--answers 4 256] [--clock cpu] [--compile]

The language model has the shape of SmolLM2-135M (30 layers of 576 channels, 49,152 words, random weights), the tower is that of
the recipe `smollm2`, and so are losses, optimiser and budgets of its stage II-b. Lengths are drawn log-uniformly: images of
2 x 2 to 16 x 16 visual tokens, answers of 4 to 256 tokens; `--sides 14 16 --answers 4 75` is near to the recipe, whose rows
have at most 355 tokens, half of them above 290. `--so400m N` takes N layers of the shape of SigLIP So400m for the tower. Arm
"bf16" is "packed" under autocast. Every arm is a process of its own that takes the same samples; arms run in turn, `--rounds`
times. It prints medians of seconds per step, tokens per second without padding, and the largest resident memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PATCHES_PER_TOKEN, PATCH = 4, 8
VOCABULARY = 49_152
IMAGE_ID = VOCABULARY - 1


def module(name: str) -> Any:
    """A module of the trainer by its last name, wherever the checkout at hand keeps it."""
    for package in ("comp", "comp.train"):
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(name)


def make_samples(count: int, sides: list[int], answers: list[int]) -> list[Any]:
    import torch

    from comp.data.packing import EncodedSample

    generator = torch.Generator().manual_seed(0)

    def drawn(low: float, high: float) -> float:
        return math.exp(torch.empty(()).uniform_(math.log(low), math.log(high), generator=generator).item())

    samples = []
    for number in range(count):
        rows, columns = (max(2, round(drawn(*sides))) for _ in range(2))
        visual, answer = rows * columns, round(drawn(*answers))
        grid = (1, 2 * rows, 2 * columns)
        words = torch.randint(10, VOCABULARY - 10, (24 + answer,), generator=generator).tolist()
        ids = [*words[:6], *[IMAGE_ID] * visual, *words[6:]]
        labels = [-100] * (len(ids) - answer) + ids[-answer:]
        patches = torch.rand(PATCHES_PER_TOKEN * visual, 3 * PATCH * PATCH, generator=generator)
        samples.append(
            EncodedSample(
                name=f"{number}",
                input_ids=ids,
                labels=labels,
                answer_ids=words[-answer:],
                patches=[patches],
                grids=[grid],
                num_visual_tokens=visual,
            )
        )
    return samples


def make_model(options: argparse.Namespace, stage: Any) -> Any:
    """A CoMP of the shapes that the options ask for, random weights, ready for the steps of a stage."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from comp.model import CoMP, VisionEncoder
    from comp.recipes import RECIPES

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    tower = VisionEncoder.from_pretrained(RECIPES["smollm2"]().vision.path).float()
    if options.so400m:
        shape = dict(width=1152, num_heads=16, mlp_width=4304, num_layers=options.so400m)
        tower = VisionEncoder(dataclasses.replace(tower.config, **shape))
    arguments = {} if options.arm != "padded" else dict(pack_rows=False)
    model = CoMP(tower, LlamaForCausalLM(config), image_token_id=IMAGE_ID, **arguments)
    model.set_word_counts(torch.ones(VOCABULARY))
    if options.compile:
        module("parallel").compile_blocks(model)
    module("optim").set_trainable(model, stage.trainable)
    model.encoder.pos_mode = "abs+rope"
    return model.train()


def make_step(samples: list[Any], stage: Any, *, padded: bool) -> Any:
    """The samples packed under the budgets of the stage, as the trainer's loader hands them over."""
    import inspect

    from comp.data.loader import StepData
    from comp.data.packing import collate, pack

    limits: dict[str, Any] = dict(visual_tokens=stage.forward_visual_tokens, text_tokens=stage.forward_text_tokens)
    if "padded" in inspect.signature(pack).parameters:  # not in checkouts from before rows were packed
        limits["padded"] = padded
    fields = dict(
        step=0,
        batches=[collate(group, pad_id=0, patch_features=3 * PATCH * PATCH) for group in pack(samples, **limits)],
        num_samples=len(samples),
        num_images=len(samples),
        num_text_tokens=sum(len(s.input_ids) for s in samples),
        num_visual_tokens=sum(s.num_visual_tokens for s in samples),
        skipped=[],
        notes=[],
    )
    return StepData(**{name: value for name, value in fields.items() if name in StepData.__dataclass_fields__})


def work(options: argparse.Namespace) -> dict[str, Any]:
    """The steps of one arm, in a process of its own."""
    import torch

    torch.set_num_threads(options.threads)
    from comp.recipes import RECIPES

    step_module = module("step")
    world = module("parallel").start_world("cpu")
    stage = next(stage for stage in RECIPES["smollm2"]().stages if stage.name == "II-b")
    model = make_model(options, stage)
    optimizer = module("optim").build_optimizer(model, stage.optim)
    samples = make_samples(options.samples, options.sides, options.answers)
    data = make_step(samples, stage, padded=options.arm == "padded")
    totals = step_module.StepTotals.gather(data, world, stop=False)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times, losses, bf16 = [], [], options.bf16 or options.arm == "bf16"
    for _ in range(options.steps + 1):
        begin = clock()
        losses.append(step_module.train_step(model, optimizer, data, totals, stage, world, pad_id=0, bf16=bf16).loss)
        times.append(clock() - begin)
    return dict(
        seconds=times[1:],  # the first step warms up
        losses=losses,
        tokens=data.num_text_tokens,
        slots=sum(batch.input_ids.numel() for batch in data.batches),
        forwards=len(data.batches),
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )


def run_arm(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", "--arm", arm, "--samples", f"{options.samples}"]
    command += ["--layers", f"{options.layers}", "--steps", f"{options.steps}", "--threads", f"{options.threads}"]
    command += ["--clock", options.clock, "--so400m", f"{options.so400m}"]
    command += ["--sides", *map(str, options.sides), "--answers", *map(str, options.answers)]
    command += ["--compile"] * (options.compile and arm == "packed") + ["--bf16"] * options.bf16
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": f"{options.threads}"}
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(arm: str, runs: list[dict[str, Any]]) -> str:
    """Of the table: medians of the rounds so far."""
    seconds = statistics.median(s for run in runs for s in run["seconds"])
    peak = statistics.median(run["peak_gib"] for run in runs)
    one = runs[0]
    padding = 0.0 if arm in ("packed", "bf16") else 1 - one["tokens"] / one["slots"]
    return (
        f"{arm:7} {seconds:6.2f} {one['tokens'] / seconds:9.0f} {100 * padding:7.0f}% {one['forwards']:9} {peak:9.2f}"
        f"  {one['losses'][0]:.6f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="another checkout, with its libraries built")
    parser.add_argument("--arms", nargs="+", default=["packed", "padded"], choices=["packed", "padded", "bf16"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sides", type=int, nargs=2, default=[2, 16], help="of images, in visual tokens")
    parser.add_argument("--answers", type=int, nargs=2, default=[4, 256], help="tokens of answers")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--so400m", type=int, default=0, help="layers of SigLIP So400m in place of the recipe's tower")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each arm in each round, after one that is not")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time of all threads, where others compute too"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the packed arm")
    parser.add_argument("--bf16", action="store_true", help="all arms under autocast")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--arm", default="packed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return 0
    arms = [(arm, HERE) for arm in options.arms] + ([("peer", options.peer.resolve())] if options.peer else [])
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm, _ in arms}
    print("arm     s/step  tokens/s  padding  forwards  peak GiB  first loss")
    for _ in range(options.rounds):
        for arm, folder in arms:
            found[arm].append(run_arm(arm, folder, options))
            print(line(arm, found[arm]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
