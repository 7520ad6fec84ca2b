"""Held-out evaluation: a model answers questions, predictions go to a JSONL file, scores are averaged per question type."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.batch import Batch, Sample
from ..data.datasets import BadSampleError, Dataset
from ..data.encode import SampleEncoder, prompt_messages, reference_answers
from ..data.packing import EncodedSample, collate
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


def answer_questions(
    model: Any,
    samples: Dataset,
    encoder: SampleEncoder,
    *,
    indices: Sequence[int],
    metric: str,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    after_batch: Callable[[], bool] | None = None,
) -> tuple[list[Prediction], list[str]]:
    """Greedy answers of `model` to the questions `indices` of `samples`, scored.

    metric:       for samples that name none, one of `METRICS`.
    after_batch:  called after every batch; true ends the evaluation there.
    Returns the predictions in the order of `indices`, and a message for every sample that could not be used.
    """
    predictions: dict[int, Prediction] = {}
    skipped: list[str] = []
    for members in _batches(samples, encoder, indices, batch_size, skipped):
        batch = _prompt_batch([encoded for _, _, encoded in members], encoder).to(device)
        answers = model.generate(batch, max_new_tokens=max_new_tokens, eos_token_id=encoder.template.turn_end)
        for (index, sample, _), ids in zip(members, answers):
            predictions[index] = _score(sample, encoder.template.decode(ids), metric)
        if after_batch is not None and after_batch():
            break
    return [predictions[i] for i in indices if i in predictions], skipped


def _batches(
    samples: Dataset, encoder: SampleEncoder, indices: Sequence[int], batch_size: int, skipped: list[str]
) -> Iterator[list[tuple[int, Sample, EncodedSample]]]:
    members = []
    for index in indices:
        try:
            sample = samples[index]
            reference_answers(sample)
            members.append((index, sample, encoder.encode_prompt(sample)))
        except BadSampleError as error:
            skipped.append(str(error))
        if len(members) == batch_size:
            yield members
            members = []
    if members:
        yield members


def _prompt_batch(encoded: Sequence[EncodedSample], encoder: SampleEncoder) -> Batch:
    return collate(encoded, pad_id=encoder.template.pad_id, patch_features=encoder.patch_features)


def _score(sample: Sample, text: str, default_metric: str) -> Prediction:
    name = sample.metric or default_metric
    if name not in METRICS:
        raise ValueError(f"{sample.name}: metric must be one of {', '.join(METRICS)}, got {name!r}")
    answers = reference_answers(sample)
    return Prediction(
        name=sample.name,
        question_type=sample.question_type,
        question=prompt_messages(sample)[-1].text,
        answers=answers,
        prediction=text,
        metric=name,
        score=METRICS[name](text, answers),
    )


def scores_by_type(predictions: Iterable[Prediction]) -> dict[str, dict[str, Any]]:
    """{question type: {"score": mean in [0, 1], "count": n, "metric": name}}, types sorted, "overall" (mean over all) last."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.question_type].append(prediction)
    everything = [p for group in groups.values() for p in group]
    table = {name: _summary(groups[name]) for name in sorted(groups)}
    return table | {OVERALL: _summary(everything)} if everything else {}


def _summary(predictions: Sequence[Prediction]) -> dict[str, Any]:
    names = sorted({p.metric for p in predictions})
    return {
        "score": sum(p.score for p in predictions) / len(predictions),
        "count": len(predictions),
        "metric": " / ".join(names),
    }


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """One JSON object per line with question, accepted answers, prediction and score."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions))


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
