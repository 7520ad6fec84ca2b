"""Held-out evaluation: batching, scoring, tables, files, and baselines that do not look."""

import json

import pytest
import torch
from toy import ColouredRectangles, make_sample_encoder

from comp.config import ConfigError
from comp.data.batch import Message, Sample
from comp.eval.vqa import answer_loss, answer_questions, blind_baselines, scores_by_type, write_predictions
from comp.model.multimodal import CoMPOutput
from comp.train.summary import result_table


@pytest.fixture(scope="module")
def encoder(template):
    return make_sample_encoder(template, max_visual_tokens=64)


class SaysRed:
    """Stands in for a model: always "red", and remembers the batches it saw."""

    def __init__(self, template):
        self.template, self.batches = template, []

    def generate(self, batch, *, max_new_tokens, eos_token_id):
        assert eos_token_id == self.template.end_ids  # of an answer and of a document, as the export says
        self.batches.append(batch)
        return [self.template.encode_text("red")] * len(batch.input_ids)


def ask(encoder, samples, **changes):
    model = SaysRed(encoder.template)
    settings = dict(indices=range(len(samples)), metric="exact_match", max_new_tokens=4, batch_size=4) | changes
    return model, answer_questions(model, samples, encoder, **settings)


def test_answers_are_scored_by_type(encoder):
    model, (predictions, skipped) = ask(encoder, ColouredRectangles(10, mixed=False))
    assert [len(b.input_ids) for b in model.batches] == [4, 4, 2] and not skipped
    assert [p.name for p in predictions] == [f"rectangle {i}" for i in range(10)]
    scores = scores_by_type(predictions)
    # odd numbers ask for the colour: 1, 3, 5, 7, 9 are green, black, red, blue, white
    assert scores["colour"] == {"score": 0.2, "count": 5, "metric": "exact_match"}
    assert scores["shape"]["score"] == 0 and scores["overall"] == {"score": 0.1, "count": 10, "metric": "exact_match"}
    assert list(scores) == ["colour", "shape", "overall"]


def multiple_choice(number, answer, group):
    messages = [Message(role="user", text="q"), Message(role="assistant", text=answer)]
    return Sample(name=f"{number}", messages=messages, metric="mmbench", options=["red", "blue"], group=group)


def test_a_group_is_right_only_if_all_its_questions_are(encoder):
    """The model says "red": option A everywhere."""
    samples = [
        multiple_choice(1, "A", "x"),
        multiple_choice(2, "B", "x"),
        multiple_choice(3, "A", "y"),
        multiple_choice(4, "A", "y"),
    ]
    samples += [multiple_choice(5, "B", None), multiple_choice(6, "B", None)]
    _, (predictions, _) = ask(encoder, samples)
    assert [p.score for p in predictions] == [1, 0, 1, 1, 0, 0]
    assert scores_by_type(predictions)["overall"] == {"score": 0.25, "count": 4, "metric": "mmbench"}


def test_the_answer_is_not_shown_to_the_model(encoder):
    model, _ = ask(encoder, ColouredRectangles(4, mixed=False))
    for row in model.batches[0].input_ids:
        text = encoder.template.tokenizer.decode(row[row != encoder.template.pad_id])
        assert text.endswith("<|im_start|>assistant\n")


def test_broken_questions_are_reported(encoder):
    samples = ColouredRectangles(5, mixed=False, broken=(1,))
    _, (predictions, skipped) = ask(encoder, samples)
    assert len(predictions) == 4 and skipped[0].startswith("rectangle 1: image /nowhere/broken.png")


def test_unknown_metric_is_refused(encoder):
    messages = [Message(role="user", text="q"), Message(role="assistant", text="a")]
    with pytest.raises(ConfigError, match=r"odd one: metric must be one of .*, got 'bleu'"):
        ask(encoder, [Sample(name="odd one", messages=messages, metric="bleu")])
    with pytest.raises(ConfigError, match="odd one: vqa_accuracy: answers needs at least four annotators"):
        ask(encoder, [Sample(name="odd one", messages=messages, metric="vqa_accuracy")])


class CountsLabels(torch.nn.Module):
    """Stands in for a model: a learned token with id i costs i nats."""

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        learned = batch.labels[batch.labels != -100]
        return CoMPOutput(token_loss_sum=learned.sum().float(), num_tokens=len(learned), alignment_loss=None)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answer_loss_is_the_mean_over_the_tokens_of_the_answers(encoder, batch_size):
    samples, indices, template = ColouredRectangles(8, mixed=False), [0, 3, 4, 7], encoder.template
    answers = [samples[i].messages[-1].text for i in indices]
    ids = [i for answer in answers for i in (*template.encode_text(answer), template.turn_end)]
    model = CountsLabels().train()
    loss = answer_loss(model, (encoder.encode(samples[i]) for i in indices), encoder, batch_size=batch_size)
    assert loss == pytest.approx(sum(ids) / len(ids)) and model.training
    with pytest.raises(ConfigError, match="none of the held-out samples can be used"):
        answer_loss(model, [], encoder, batch_size=batch_size)


def test_predictions_are_one_json_per_line(encoder, tmp_path):
    _, (predictions, _) = ask(encoder, ColouredRectangles(3, mixed=False))
    write_predictions(tmp_path / "new" / "p.jsonl", predictions)
    lines = [json.loads(line) for line in (tmp_path / "new" / "p.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "name": "rectangle 1",
        "question_type": "colour",
        "question": "What colour is it?",
        "answers": ["green"],
        "prediction": "red",
        "metric": "exact_match",
        "score": 0.0,
        "group": None,
    }


def answered(kind, answer):
    messages = [Message(role="user", text="q"), Message(role="assistant", text=answer)]
    return Sample(name="s", messages=messages, question_type=kind)


def test_baselines_know_only_training_answers():
    train = [answered("a", "yes")] * 9 + [answered("a", "no")] + [answered("b", "seven")] * 3
    held_out = [answered("a", "yes")] * 100 + [answered("a", "no")] * 100 + [answered("b", "seven")]
    scores = blind_baselines(train, held_out, metric="exact_match", seed=0)
    assert scores["most frequent"]["a"]["score"] == 0.5 and scores["most frequent"]["b"]["score"] == 1
    # random says yes 9 times of 10: right 0.9 of the first half, 0.1 of the second
    assert 0.4 < scores["random"]["a"]["score"] < 0.6
    assert blind_baselines(train, held_out, metric="exact_match", seed=0) == scores


def test_result_table_by_hand():
    scores = {"colour": {"score": 0.125, "count": 8, "metric": "anls"}, "overall": {"score": 0.5, "count": 9, "metric": "anls"}}
    table = result_table([{"label": "before", "scores": {}}, {"label": "III", "scores": scores}], {"random": scores})
    assert table.splitlines() == [
        "question type  count  random  before   III",
        "-------------  -----  ------  ------  ----",
        "colour             8    12.5       -  12.5",
        "overall            9    50.0       -  50.0",
    ]
