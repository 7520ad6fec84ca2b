"""Held-out evaluation: a model answers questions, predictions go to a JSONL file, scores are averaged per question type."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..config import ConfigError, need_choice
from ..data.batch import BadSampleError, Batch, Sample
from ..data.datasets import Dataset
from ..data.encode import SampleEncoder, prompt_messages, reference_answers
from ..data.packing import EncodedSample, collate
from ..model.causal_lm import evaluation_mode
from ..parallel import ALONE, World
from .choices import CHOICE_METRICS
from .metrics import METRICS

OVERALL = "overall"


@dataclass(kw_only=True, slots=True)
class Prediction:
    name: str
    question_type: str
    question: str
    answers: list[str]
    prediction: str
    metric: str
    score: float
    group: str | None = None
    """See `Sample.group`."""


class Answering(Protocol):
    """A CoMP, or anything with its `generate`."""

    def generate(self, batch: Batch, *, max_new_tokens: int, eos_token_id: Sequence[int]) -> list[list[int]]: ...


def answer_questions(
    model: Answering,
    samples: Dataset,
    encoder: SampleEncoder,
    *,
    indices: Sequence[int],
    world: World = ALONE,
    after_batch: Callable[[], bool] | None = None,
    **settings: Any,
) -> tuple[list[Prediction], list[str]]:
    """All that `answer_batches` gives with such settings: the predictions in the order of the indices, and a message for every
    sample that could not be used.

    world:        its processes share the indices; each gets the whole.
    after_batch:  called after every batch; true ends the evaluation of this process there.
    """
    results: list[Prediction | str] = []
    for batch in answer_batches(model, samples, encoder, indices=indices[world.rank :: world.size], **settings):
        results += batch
        if after_batch is not None and after_batch():
            break
    results = world.in_turns(results)
    return [r for r in results if isinstance(r, Prediction)], [r for r in results if isinstance(r, str)]


def answer_batches(
    model: Answering,
    samples: Dataset,
    encoder: SampleEncoder,
    *,
    indices: Sequence[int],
    metric: str,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] | None = None,
) -> Iterator[list[Prediction | str]]:
    """Greedy answers to questions, scored, batch by batch: for each index, in order, its prediction, or a message that the
    sample cannot be used.

    Args:
        model:  a CoMP, or anything with its `generate`.
        encoder:  what turns a sample into ids and patches (comp.build.question_encoder).
        indices:  of the questions in `samples`.
        metric:  for samples that name none, one of `comp.eval.metrics.METRICS`.
        say:  called with what the samples' records hold and nobody reads (`Sample.notes`); None: on stderr, each once.

    Raises ConfigError where a metric does not exist, or cannot score the answers of its sample.
    """
    for begin in range(0, len(indices), batch_size):
        chunk = indices[begin : begin + batch_size]
        results: dict[int, Prediction | str] = {}
        members: list[tuple[int, Sample]] = []
        prompts: list[EncodedSample] = []
        for index in chunk:
            try:
                sample = samples[index]
                for note in sample.notes:
                    (say or say_once)(note)
                _score(sample, "", metric)  # what cannot be scored should not wait for its answer
                prompts.append(encoder.encode_prompt(sample))
                members.append((index, sample))
            except BadSampleError as error:
                results[index] = str(error)
        answers = generate_answers(model, prompts, encoder, max_new_tokens=max_new_tokens, device=device)
        for (index, sample), answer in zip(members, answers):
            results[index] = _score(sample, answer, metric)
        yield [results[index] for index in chunk]


_said: set[str] = set()


def say_once(note: str) -> None:
    """On stderr, once in this process."""
    if note not in _said:
        _said.add(note)
        print(note, file=sys.stderr)


def generate_answers(
    model: Answering,
    prompts: Sequence[EncodedSample],
    encoder: SampleEncoder,
    *,
    max_new_tokens: int,
    device: torch.device | str,
) -> list[str]:
    """Greedy answers to encoded prompts, all in one batch: images packed, text padded on the right."""
    if not prompts:
        return []
    batch = collate(prompts, pad_id=encoder.template.pad_id, patch_features=encoder.patch_features).to(device)
    answers = model.generate(batch, max_new_tokens=max_new_tokens, eos_token_id=encoder.template.end_ids)
    return [encoder.template.decode(ids) for ids in answers]


def usable_samples(samples: Dataset, encoder: SampleEncoder, indices: Iterable[int], told: str) -> Iterator[EncodedSample]:
    """Those that can be learned from; the others are said, behind `told`."""
    for index in indices:
        try:
            yield encoder.encode(samples[index])
        except BadSampleError as error:
            say_once(f"{told}{error}")


@torch.no_grad()
def answer_loss(
    model: nn.Module,
    samples: Iterable[EncodedSample],
    encoder: SampleEncoder,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> float:
    """Mean next-token loss of the reference answers, in nats per learned token: less noisy than a score.

    samples:  what `encoder` made. Learned tokens are those of training: the answers of all turns and the end of each.
    """
    total, count = 0.0, 0
    remaining = iter(samples)
    with evaluation_mode(model):
        while encoded := list(islice(remaining, batch_size)):
            batch = collate(encoded, pad_id=encoder.template.pad_id, patch_features=encoder.patch_features)
            output = model(batch.to(device))
            total, count = total + output.token_loss_sum.item(), count + output.num_tokens
    if not count:
        raise ConfigError("none of the held-out samples can be used for the loss of the answers")
    return total / count


def _score(sample: Sample, text: str, default_metric: str) -> Prediction:
    name = sample.metric or default_metric
    answers = reference_answers(sample)
    need_choice(f"{sample.name}: metric", name, (*METRICS, *CHOICE_METRICS))
    try:
        score = METRICS[name](text, answers) if name in METRICS else CHOICE_METRICS[name](text, answers, sample.options)
    except ValueError as error:
        raise ConfigError(f"{sample.name}: {name}: {error}") from error
    return Prediction(
        name=sample.name,
        question_type=sample.question_type,
        question=prompt_messages(sample)[-1].text,
        answers=answers,
        prediction=text,
        metric=name,
        score=score,
        group=sample.group,
    )


def scores_by_type(predictions: Iterable[Prediction]) -> dict[str, dict[str, Any]]:
    """{question type: {"score": mean in [0, 1], "count": n, "metric": name}}, types sorted, "overall" (mean over all) last.

    Predictions of one group (`Sample.group`) count once, with the product of their scores.
    """
    by_type: dict[str, list[list[Prediction]]] = defaultdict(list)
    for group in _groups(predictions):
        by_type[group[0].question_type].append(group)
    everything = [group for groups in by_type.values() for group in groups]
    table = {name: _summary(by_type[name]) for name in sorted(by_type)}
    return table | {OVERALL: _summary(everything)} if everything else {}


def all_types(tables: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Every question type that any of several `scores_by_type` has, with its newest entry; "overall" last."""
    newest = {name: entry for table in tables for name, entry in table.items()}
    return dict(sorted(newest.items(), key=lambda item: (item[0] == OVERALL, item[0])))


def percent(scores: dict[str, dict[str, Any]], question_type: str) -> str:
    """A score of `scores_by_type` for a table; "-" where it has no such type."""
    return f"{100 * scores[question_type]['score']:.1f}" if question_type in scores else "-"


def _groups(predictions: Iterable[Prediction]) -> list[list[Prediction]]:
    """Predictions of one group together, each other one alone."""
    groups: dict[Any, list[Prediction]] = defaultdict(list)
    for number, prediction in enumerate(predictions):
        groups[number if prediction.group is None else prediction.group].append(prediction)
    return list(groups.values())


def _summary(groups: Sequence[Sequence[Prediction]]) -> dict[str, Any]:
    names = sorted({p.metric for group in groups for p in group})
    return {
        "score": sum(prod(p.score for p in group) for group in groups) / len(groups),
        "count": len(groups),
        "metric": " / ".join(names),
    }


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """One JSON object per line with question, accepted answers, prediction and score."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions)
    path.write_text(lines, encoding="utf-8")


def blind_baselines(train: Dataset, held_out: Dataset, *, metric: str, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores of two ways to answer without looking at the image, by question type:

    "random"         a training answer of the same question type, drawn at random
    "most frequent"  the most frequent training answer of the same question type
    """
    pools: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in _readable(train):
        pools[sample.question_type][sample.messages[-1].text] += 1
    rng = np.random.default_rng(seed)
    guesses: dict[str, list[Prediction]] = {"random": [], "most frequent": []}
    for sample in _readable(held_out):
        pool = pools.get(sample.question_type) or sum(pools.values(), Counter())
        texts, counts = list(pool), np.array(list(pool.values()))
        guesses["random"].append(_score(sample, texts[rng.choice(len(texts), p=counts / counts.sum())], metric))
        guesses["most frequent"].append(_score(sample, pool.most_common(1)[0][0], metric))
    return {name: scores_by_type(predictions) for name, predictions in guesses.items()}


def _readable(samples: Dataset) -> Iterator[Sample]:
    for index in range(len(samples)):
        try:
            sample = samples[index]
            reference_answers(sample)
        except BadSampleError:
            continue
        yield sample
