"""Continual multimodal pre-training: `torchrun train.py [--recipe NAME] [field=value ...] [--resume]`, or with python alone.

Writes runs/NAME/{config.json, metrics.jsonl, summary.json, checkpoints/, models/, predictions/, plots/*.png, tensorboard/}.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys

from transformers.utils import logging

from comp.cli import print_anything
from comp.config import Config, ConfigError
from comp.config_io import apply_overrides
from comp.data.batch import BadSampleError
from comp.log import table
from comp.parallel import stop_world
from comp.recipes import RECIPES
from comp.studies.encoder import check_measures, measure_run
from comp.train.checkpoint import CheckpointError
from comp.train.step import NonFiniteLossError
from comp.train.summary import result_table
from comp.train.trainer import StopRequested, Trainer

INTERRUPTED = 128 + signal.SIGINT  # as shells count, so that what was to follow does not
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe; the exit code is 0 when it finished or was stopped with SIGTERM, 1 when the loss was not finite, a sample
    was bad under bad_samples=stop, the disk was full, or an evaluation could ask nothing, 2 when the configuration or what it
    names cannot be used, 130 after Ctrl-C."""
    options, config = read_command_line(arguments)
    print_anything()
    logging.disable_progress_bar()  # of reading and writing weights: they would draw over ours
    try:
        check_measures(config)
        trainer = Trainer(config, resume=options.resume, measure=measure_run)
    except ConfigError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(f"train.py: stopped before the first step: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted before the first step", file=sys.stderr)
        return INTERRUPTED
    code = run(trainer)
    stop_world(trainer.world)
    return code


def run(trainer: Trainer) -> int:
    """Train, say how it ended, and return the exit code."""
    say = print if trainer.world.is_main else (lambda *_, **__: None)
    try:
        summary = trainer.run()
    except StopRequested:
        checkpoint = trainer.store.latest()
        saved = f"the state is saved in {checkpoint}" if checkpoint else "nothing was learned yet"
        signal_name = "SIGINT" if trainer.interrupted else "SIGTERM"
        say(f"stopped on {signal_name} after step {trainer.state.step}; {saved}, continue with --resume")
        return INTERRUPTED if trainer.interrupted else 0
    except KeyboardInterrupt:
        say(f"interrupted after step {trainer.state.step}. {last_good(trainer)}", file=sys.stderr)
        return INTERRUPTED
    except ConfigError as error:  # seen only now that the data are read, perhaps by this process alone
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        say(f"stopped after step {trainer.state.step}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        say(f"stopped after step {trainer.state.step}: {error}. {last_good(trainer)}", file=sys.stderr)
        return 1
    except (NonFiniteLossError, BadSampleError) as error:
        say(f"stopped before step {trainer.state.step + 1}: {error}\n{last_good(trainer)}", file=sys.stderr)
        return 1
    if trainer.world.is_main:
        if summary["evaluations"]:
            print("\nheld-out score (%)\n" + result_table(summary["evaluations"], summary["baselines"]))
        if "encoder" in summary:
            print("\nthe vision tower, frozen\n" + table(summary["encoder"]["header"], summary["encoder"]["rows"]))
        skipped = summary["skipped"]
        print(
            f"\n{summary['steps']} steps, {summary['samples']} samples in {summary['seconds'] / 60:.1f} minutes; "
            f"{skipped['samples']} unusable samples skipped. Results: {trainer.folder}"
        )
        unasked = [f"{e['label']} ({e['skipped'][0]})" for e in summary["evaluations"] if not e["scores"]]
        if unasked:
            print(f"train.py: no held-out question could be asked in the evaluation {', '.join(unasked)}", file=sys.stderr)
            return 1
    return 0


def last_good(trainer: Trainer) -> str:
    checkpoint = trainer.store.newest_whole()
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written before."


def read_command_line(arguments: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default="tiny", choices=sorted(RECIPES), help="a function of comp/recipes.py (default: tiny)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run of this name from its last checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="for example stages.2.optim.lr_vision=1e-4")
    options = parser.parse_intermixed_args(arguments)
    try:
        return options, apply_overrides(RECIPES[options.recipe](), options.overrides)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
