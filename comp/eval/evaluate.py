"""Answer benchmarks with a trained model: predictions are saved as they come, and the same command goes on where it stopped.

    python -m comp.eval.evaluate runs/tiny/models/III chartqa=/data/ChartQA docvqa=/data/DocVQA
    python -m comp.eval.evaluate runs/tiny/models/III mine=questions.jsonl --output runs/mine-eval

MODEL is the export of a stage. NAME=PATH is a benchmark (`comp.eval.benchmarks`) in a folder of the Hugging Face `datasets`
library, or any name with a LLaVA-format .json, .jsonl or .yaml file. Writes OUTPUT/NAME.jsonl, a line per question, and
OUTPUT/scores.json. Under torchrun the processes share the questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..build import longest_answer, question_encoder
from ..cli import positive_int, print_anything
from ..config import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS, ConfigError, SourceConfig
from ..data.batch import BadSampleError
from ..data.datasets import Dataset
from ..data.encode import SampleEncoder, prompt_messages, reference_answers
from ..data.mixture import open_sources
from ..files import write_json
from ..log import table
from ..model import CoMP
from ..parallel import CPU_ALONE, Place, add_place_options, place_of, stop_world
from .benchmarks import BENCHMARKS, open_benchmark
from .exported import check_export, load
from .vqa import Prediction, answer_batches, scores_by_type

FILES = (".json", ".jsonl", ".yaml", ".yml")
DEFAULT_ANSWER_TOKENS = 64


def open_questions(name: str, path: str, split: str | None = None) -> tuple[Dataset, int]:
    """The questions that NAME=PATH of the command line means, and the tokens of their longest answer."""
    if Path(path).suffix in FILES:
        return open_sources([SourceConfig(path=path)], seed=0), DEFAULT_ANSWER_TOKENS
    return open_benchmark(name, path, split), BENCHMARKS[name].max_new_tokens


def answer_into(
    path: Path,
    model: CoMP,
    questions: Dataset,
    encoder: SampleEncoder,
    *,
    count: int,
    max_new_tokens: int,
    batch_size: int,
    metric: str = "exact_match",
    place: Place = CPU_ALONE,
) -> tuple[list[Prediction], list[str]]:
    """Answer the first `count` questions and append a line for each to the file `path`, which may hold some of them or more.

    batch_size:  of every process; the first one writes.
    metric: for questions that name none. Returns their predictions, and a message for every question that cannot be asked.
    Raises ConfigError where the file answers other questions.
    """
    world = place.world
    path.parent.mkdir(parents=True, exist_ok=True)
    done = world.gather(_read_lines(path)[:count] if world.is_main else None)[0]
    _check_same_questions(path, done, questions)
    progress = tqdm(total=count, initial=len(done), desc=path.stem, unit="question", disable=not world.is_main)
    with path.open("a", encoding="utf-8") if world.is_main else nullcontext() as file, progress:
        while len(done) < count:
            together = range(len(done), min(len(done) + batch_size * world.size, count))
            own: list[Prediction | str] = []
            with place.autocast():
                for batch in answer_batches(
                    model,
                    questions,
                    encoder,
                    indices=together[world.rank :: world.size],
                    metric=metric,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    device=place.device,
                ):
                    own += batch
            records = [asdict(r) if isinstance(r, Prediction) else {"skipped": r} for r in world.in_turns(own)]
            if file is not None:
                file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
                file.flush()
            done += records
            progress.update(len(records))
    return [Prediction(**r) for r in done if "skipped" not in r], [r["skipped"] for r in done if "skipped" in r]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file that may be missing. A last line that was torn by an interruption is cut off."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.decode().split("\n")[:-1]]


def _check_same_questions(path: Path, done: Sequence[dict[str, Any]], questions: Dataset) -> None:
    """ConfigError where a record is not of the question in its place: the source was edited since."""
    for index, record in enumerate(done):
        if "skipped" in record:
            continue
        try:
            sample = questions[index]
            now = (prompt_messages(sample)[-1].text, reference_answers(sample))
        except BadSampleError as error:
            raise ConfigError(f"{path}, line {index + 1} answers a question that cannot be read any more: {error}") from error
        if now != (record["question"], record["answers"]):
            was = (record["question"], record["answers"])
            raise ConfigError(
                f"{path}, line {index + 1} answers {was}, question {index + 1} is now {now}; choose another --output"
            )


def claim_output(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Note the settings of each source in `folder`; ConfigError where it holds answers of a source under others."""
    note = folder / "settings.json"
    known = json.loads(note.read_text()) if note.is_file() else {}
    for name, wanted in settings.items():
        before = known.get(name, wanted)
        changed = [f"{key}={before.get(key)!r}" for key in wanted if before.get(key) != wanted[key]]
        if changed:
            raise ConfigError(f"{folder} holds answers to {name} made with {', '.join(changed)}; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, known | settings)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a stage's export: runs/NAME/models/STAGE")
    parser.add_argument("questions", nargs="+", metavar="NAME=PATH", help=f"benchmarks: {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", type=Path, help="default: MODEL/evaluation")
    parser.add_argument("--split", help="default: the one that papers report")
    parser.add_argument("--count", type=positive_int, help="only the first questions of each")
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument(
        "--max-new-tokens", type=positive_int, help=f"default: the benchmark's, {DEFAULT_ANSWER_TOKENS} for files"
    )
    parser.add_argument(
        "--min-visual-tokens", type=positive_int, default=MIN_VISUAL_TOKENS, help="smaller images are scaled up"
    )
    parser.add_argument(
        "--max-visual-tokens",
        type=positive_int,
        default=MAX_VISUAL_TOKENS,
        help="of a question, at most 3/4 of the model's positions",
    )
    add_place_options(parser)
    options = parser.parse_args(arguments)
    print_anything()
    try:
        place = place_of(options)
        scores = evaluate(options, place)
    except ConfigError as error:
        parser.error(str(error))
    stop_world(place.world)
    unasked = [name for name, kinds in scores.items() if not kinds]
    if unasked:
        print(f"{parser.prog}: no question could be asked of {', '.join(unasked)}", file=sys.stderr)
    return 1 if unasked else 0


def evaluate(options: argparse.Namespace, place: Place) -> dict[str, dict[str, dict[str, Any]]]:
    """What the command does; returns {NAME: scores by question type}."""
    sources = open_all(options.questions, options.split)  # before the weights: a wrong path should not wait
    check_export(options.model)
    output = options.output or options.model / "evaluation"
    keys = ("model", "split", "max_new_tokens", "min_visual_tokens", "max_visual_tokens")
    settings = {key: getattr(options, key) for key in keys}
    settings |= {"model": str(options.model.resolve()), "weights": weights_digest(options.model)}
    if place.world.is_main:
        claim_output(output, {name: settings | {"path": path} for name, (path, _, _) in sources.items()})
    place.world.barrier()
    model, template = load(options.model)
    model.to(place.device)
    scores = {}
    for name, (_, questions, answer_tokens) in sources.items():
        answer_tokens = min(options.max_new_tokens or answer_tokens, longest_answer(model))
        encoder = question_encoder(
            model,
            template,
            answer_tokens=answer_tokens,
            min_visual_tokens=options.min_visual_tokens,
            max_visual_tokens=options.max_visual_tokens,
        )
        predictions, skipped = answer_into(
            output / f"{name}.jsonl",
            model,
            questions,
            encoder,
            count=min(options.count or len(questions), len(questions)),
            max_new_tokens=answer_tokens,
            batch_size=options.batch_size,
            place=place,
        )
        if skipped and place.world.is_main:
            print(f"{name}: {len(skipped)} questions could not be asked and do not count: {skipped[0]}", file=sys.stderr)
        scores[name] = scores_by_type(predictions)
    if place.world.is_main:
        _report(output / "scores.json", scores)
    return scores


def weights_digest(model: Path) -> str:
    """SHA-256 of the weight files: a folder can be trained anew, and its old answers are not the new model's."""
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def open_all(pairs: Sequence[str], split: str | None) -> dict[str, tuple[str, Dataset, int]]:
    """{NAME: (PATH, questions, tokens of an answer)}"""
    sources: dict[str, tuple[str, Dataset, int]] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not path or "/" in name or name in sources:
            raise ConfigError(f"questions must be NAME=PATH with different names that can be file names, got {pair!r}")
        sources[name] = (path, *open_questions(name, path, split))
    return sources


def _report(path: Path, scores: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print the scores, and add them to those of other sources in the file `path`."""
    write_json(path, (json.loads(path.read_text()) if path.is_file() else {}) | scores)
    rows = [
        [name, kind, f"{s['count']}", s["metric"], f"{100 * s['score']:.1f}"]
        for name, kinds in scores.items()
        for kind, s in kinds.items()
    ]
    print(table(["source", "question type", "count", "metric", "score (%)"], rows))


if __name__ == "__main__":
    sys.exit(main())
