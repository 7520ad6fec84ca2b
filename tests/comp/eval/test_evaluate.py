"""The evaluation command on a toy model: benchmark folders and LLaVA files, answers on disk, continuing, complaints."""

import json
import os
import subprocess
import sys

import datasets
import pytest
from PIL import Image
from toy import export_toy_model

from comp.eval import evaluate as command
from comp.eval.vqa import answer_batches, scores_by_type


@pytest.fixture
def exported(toy_folder, monkeypatch, tmp_path):
    """A toy model as a stage exports it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return export_toy_model(toy_folder)


@pytest.fixture
def charts(tmp_path):
    """A folder in ChartQA's layout, seven questions; the image of number 2 is damaged."""
    rows = [
        dict(
            type="human_test" if i % 2 else "augmented_test",
            question=f"How many of {i}?",
            answer=str(i),
            image=Image.new("RGB", (16 + 8 * i, 24), "red"),
        )
        for i in range(7)
    ]
    features = datasets.Features(
        {k: datasets.Value("string") for k in ("type", "question", "answer")} | {"image": datasets.Image()}
    )
    folder = tmp_path / "ChartQA" / "data"
    folder.mkdir(parents=True)
    rows[2]["image"] = dict(bytes=b"damaged", path=None)
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder.parent


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_and_predictions(exported, charts, tmp_path, capsys):
    arguments = [str(exported), f"chartqa={charts}", "--batch-size", "3", "--max-visual-tokens", "64", "--max-new-tokens", "4"]
    assert command.main(arguments) == 0
    records = lines(exported / "evaluation" / "chartqa.jsonl")
    assert [r.get("name") for r in records] == [None if i == 2 else f"chartqa[{i}]" for i in range(7)]
    assert "chartqa[2]: image" in records[2]["skipped"]
    scores = json.loads((exported / "evaluation" / "scores.json").read_text())["chartqa"]
    assert {kind: s["count"] for kind, s in scores.items()} == {"chartqa augmented": 3, "chartqa human": 3, "overall": 6}
    assert scores["overall"]["metric"] == "relaxed_accuracy"
    output = capsys.readouterr()
    assert "chartqa human" in output.out and "1 questions could not be asked" in output.err


def test_predictions_are_those_of_single_questions(exported, charts):
    """Batching does not change what the model says."""
    arguments = [str(exported), f"chartqa={charts}", "--max-visual-tokens", "64", "--max-new-tokens", "6"]
    command.main([*arguments, "--batch-size", "7", "--output", str(exported / "a")])
    command.main([*arguments, "--batch-size", "1", "--output", str(exported / "b")])
    assert lines(exported / "a" / "chartqa.jsonl") == lines(exported / "b" / "chartqa.jsonl")
    answers = [r["prediction"] for r in lines(exported / "a" / "chartqa.jsonl") if "skipped" not in r]
    assert len(set(answers)) > 3  # they depend on the question


def test_an_interrupted_evaluation_goes_on(exported, charts, monkeypatch):
    arguments = [str(exported), f"chartqa={charts}", "--batch-size", "2", "--max-visual-tokens", "64", "--max-new-tokens", "4"]
    command.main([*arguments, "--output", str(exported / "whole")])
    asked = []

    def interrupted(*positional, indices, **named):
        for batch in answer_batches(*positional, indices=indices, **named):
            asked.append(indices)
            if len(asked) == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(command, "answer_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main([*arguments, "--output", str(exported / "parts")])
    path = exported / "parts" / "chartqa.jsonl"
    with path.open("a") as file:
        file.write('{"name": "torn')
    command.main([*arguments, "--output", str(exported / "parts")])
    assert [list(indices) for indices in asked] == [[0, 1], [2, 3], [4, 5], [4, 5], [6]]  # the first two batches were there
    assert path.read_text() == (exported / "whole" / "chartqa.jsonl").read_text()
    command.main([*arguments, "--output", str(exported / "parts")])
    assert len(asked) == 5  # nothing left to ask


def test_asking_fewer_questions_keeps_the_other_answers(exported, charts):
    arguments = [str(exported), f"chartqa={charts}", "--max-visual-tokens", "64", "--max-new-tokens", "4"]
    command.main(arguments)
    path = exported / "evaluation" / "chartqa.jsonl"
    before = path.read_text()
    command.main([*arguments, "--count", "2"])
    assert path.read_text() == before
    assert json.loads((path.parent / "scores.json").read_text())["chartqa"]["overall"]["count"] == 2


def test_answers_of_another_model_or_to_other_questions_are_not_taken(exported, tmp_path, capsys):
    def ask(*questions):
        turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": "A"}] for q in questions]
        lines = (json.dumps({"conversations": conversation}) for conversation in turns)
        (tmp_path / "mine.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return command.main([str(exported), f"mine={tmp_path / 'mine.jsonl'}", "--max-new-tokens", "2"])

    assert ask("Is it\x85green?", "Is it\u2028blue?") == 0
    assert ask("Is it\x85green?", "Is it\u2028blue?", "Is it red?") == 0  # more of them: the first are kept
    with pytest.raises(SystemExit):
        ask("Is it red?", "Is it blue?")
    assert "line 1 answers ('Is it\\x85green?', ['A']), question 1 is now ('Is it red?', ['A'])" in capsys.readouterr().err
    weights = exported / "vision" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SystemExit):
        ask("Is it\x85green?")
    assert "answers to mine made with weights=" in capsys.readouterr().err


def test_llava_file_beside_a_benchmark(exported, charts, tmp_path):
    Image.new("RGB", (24, 16), "blue").save(tmp_path / "blue.png")
    record = {
        "image": "blue.png",
        "conversations": [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": "A"}],
        "metric": "mmbench",
        "options": ["blue", "red"],
    }
    (tmp_path / "mine.jsonl").write_text(json.dumps(record) + "\n")
    arguments = [str(exported), "--max-visual-tokens", "64", "--max-new-tokens", "4", "--output", str(tmp_path / "out")]
    command.main([*arguments, f"mine={tmp_path / 'mine.jsonl'}"])
    command.main([*arguments, f"chartqa={charts}", "--count", "2"])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["mine"]["overall"]["count"] == 1 and scores["chartqa"]["overall"]["count"] == 2
    (record,) = lines(tmp_path / "out" / "mine.jsonl")
    assert record["question"] == "Colour?" and record["metric"] == "mmbench"


def test_a_source_of_which_nothing_can_be_asked_fails(exported, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"conversations": []}\n')
    assert command.main([str(exported), f"bad={tmp_path / 'bad.jsonl'}"]) == 1
    assert "no question could be asked of bad" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (["chartqa"], "questions must be NAME=PATH"),
        (["chartqa=CHARTS", "chartqa=CHARTS"], "different names"),
        (["bird=CHARTS"], "benchmark must be one of chartqa, docvqa"),
        (["mine=nowhere.jsonl"], "nowhere.jsonl is not a file"),
    ],
)
def test_mistakes_on_the_command_line(exported, charts, questions, message, capsys):
    with pytest.raises(SystemExit):
        command.main([str(exported), *(q.replace("CHARTS", str(charts)) for q in questions)])
    assert message in capsys.readouterr().err


def test_numbers_must_be_positive(exported, charts, capsys):
    for option in ("--count", "--batch-size", "--max-new-tokens", "--min-visual-tokens", "--max-visual-tokens"):
        with pytest.raises(SystemExit):
            command.main([str(exported), f"chartqa={charts}", option, "0"])
        assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


def test_answers_of_other_settings_are_not_mixed(exported, charts, capsys):
    arguments = [str(exported), f"chartqa={charts}", "--count", "1", "--max-new-tokens", "2"]
    command.main([*arguments, "--max-visual-tokens", "16"])
    with pytest.raises(SystemExit):
        command.main([*arguments, "--max-visual-tokens", "64"])
    assert "answers to chartqa made with max_visual_tokens=16; choose another --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([str(charts), f"chartqa={charts}"])
    assert "a model must be a folder with vision/ and language/" in capsys.readouterr().err


def test_the_table_is_made_of_the_file(exported, charts):
    command.main([str(exported), f"chartqa={charts}", "--max-visual-tokens", "64", "--max-new-tokens", "4"])
    folder = exported / "evaluation"
    predictions = [command.Prediction(**r) for r in lines(folder / "chartqa.jsonl") if "skipped" not in r]
    assert json.loads((folder / "scores.json").read_text())["chartqa"] == scores_by_type(predictions)


@pytest.mark.slow
def test_the_locale_does_not_matter(exported, tmp_path):
    """A question in a script that the locale's encoding lacks; the mixture is UTF-8 as well."""
    turns = [{"from": "human", "value": "größer als 5 °C, 大きい?"}, {"from": "gpt", "value": "ja ✓"}]
    (tmp_path / "Fragen.jsonl").write_text(json.dumps(dict(conversations=turns, question_type="Größe")))
    (tmp_path / "alle.yaml").write_text("# 大\ndatasets: [{json_path: Fragen.jsonl}]", encoding="utf-8")
    ascii_alone = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    command = [sys.executable, "-m", "comp.eval.evaluate", exported, f"mine={tmp_path}/alle.yaml", "--output", tmp_path / "out"]
    for _ in range(2):  # the second reads what the first wrote
        done = subprocess.run(command, env=ascii_alone, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert b"Gr\\xf6\\xdfe" in done.stdout
    (line,) = (tmp_path / "out" / "mine.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["question"] == turns[0]["value"]
