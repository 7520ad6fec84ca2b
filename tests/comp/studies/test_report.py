"""The report page, from the files of a run: every figure where it belongs, in both forms, and what is missing left out."""

import dataclasses
import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import save_toy_models, toy_config

from comp.config import ConfigError, SourceConfig
from comp.config_io import to_dict
from comp.data.batch import Message, Sample
from comp.model import VisionEncoder
from comp.studies.report.page import Example, Gallery, Heading, Table, write_page
from comp.studies.report.pictures import centre_attention, feature_colours
from comp.studies.report.report import HeldOutSamples, choose_names, held_out_samples, main, telling_pictures, write_report
from comp.studies.sweep import write_sweep
from comp.train.plots import plot_run

LABELS = ("before", "I", "III")


def prediction(number: int, text: str, score: float) -> dict:
    kind = "colour" if number % 2 else "shape"
    return dict(
        name=f"rectangle {number}",
        question_type=kind,
        question=f"What <{kind}>?",
        answers=["red"],
        prediction=text,
        metric="exact_match",
        score=score,
    )


def write_run(folder: Path, **changes) -> Path:
    """The files of a finished run with three evaluations of six questions; scores 10%, 20% and 90% overall."""
    config = toy_config(folder, **changes)
    run = folder / "runs" / config.name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    scores = [{"overall": dict(score=s, count=6, metric="exact_match")} for s in (0.1, 0.2, 0.9)]
    evaluations = [dict(event="evaluation", step=i, label=label, scores=s) for i, (label, s) in enumerate(zip(LABELS, scores))]
    train = [
        dict(
            event="train", step=i, stage="I", loss=3.0 - i, token_loss=3.0 - i, lr={"adapter": 1e-3}, grad_norm={"adapter": 1.0}
        )
        | dict(images_per_s=5.0, tokens_per_s=50.0)
        for i in range(2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (*evaluations, *train)))
    stage = dict(steps=2, token_loss=dict(first=3.0, last=2.0), median_images_per_s=5.0)
    summary = dict(
        baselines={"random": {"overall": dict(score=0.25, count=6, metric="exact_match")}},
        stages=[stage] * 4,
        steps=11,
        images=85,
        text_tokens=5223,
        seconds=120,
        skipped=dict(samples=0),
        machine=dict(processes=1, device="cpu", threads=2),
    )
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "predictions").mkdir()
    for label in LABELS:
        lines = (json.dumps(prediction(100 + i, f"{label} says <{i}>", float(label == "III"))) for i in range(6))
        (run / "predictions" / f"{label}.jsonl").write_text("\n".join(lines))
    return run


def test_a_finished_run(tmp_path):
    run = write_run(tmp_path)
    html_file, markdown_file = write_report(run, pictures=False, num_examples=4)
    html, markdown = html_file.read_text(), markdown_file.read_text()
    for text in ("90.0%", "10.0% before training", "3.000 → 2.000", "2.0 min", "native", "5,223"):
        assert text in html and text in markdown, text
    assert "25.0" in html  # the baseline
    assert html.count('class="card"') == 4
    assert "III says &lt;0&gt;" in html and "<0>" not in html  # nothing of the data is taken for markup
    assert 'class="good">III says' in html and 'class="bad">before says' in html
    assert "src=" in html and not re.search(r'src="(?!data:)', html)  # one file
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown):
        assert (run / target).is_file(), target


def test_an_unfinished_run_and_missing_pieces(tmp_path):
    run = write_run(tmp_path)
    (run / "summary.json").unlink()
    (run / "predictions" / "before.jsonl").unlink()
    html = write_report(run, pictures=False)[0].read_text()
    assert "not finished" in html and "III says" in html and "before says" not in html
    for name in LABELS[1:]:
        (run / "predictions" / f"{name}.jsonl").unlink()
    (run / "metrics.jsonl").write_text("")
    html = write_report(run, pictures=False)[0].read_text()
    assert "Stages" in html and "Examples" not in html and "Held-out" not in html


def test_an_evaluation_without_scores_hides_no_other(tmp_path):
    run = write_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(dict(event="evaluation", step=9, label="last", scores={})) + "\n")
    markdown = write_report(run, pictures=False)[1].read_text()
    (row,) = (line for line in markdown.splitlines() if "overall" in line)
    assert re.sub(r"[*\s]", "", row) == "|overall|6|exactmatch|25.0|10.0|20.0|90.0||"
    assert "% before training" not in markdown


def test_data_that_is_gone_costs_only_the_examples(tmp_path, capsys):
    config = toy_config(tmp_path)
    run = write_run(tmp_path, eval=dataclasses.replace(config.eval, data=[SourceConfig(path="/nowhere/data.jsonl")]))
    html = write_report(run, pictures=False)[0].read_text()
    assert "Examples" not in html and "Held-out questions" in html
    assert "/nowhere/data.jsonl" in capsys.readouterr().err


def test_single_bad_questions_cost_only_themselves(tmp_path, capsys):
    """As in training, which names and counts them; and an answer may hold what Unicode calls a line end."""
    for number in range(3):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{number}.png")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    records = [json.dumps({"id": str(i), "image": f"{i}.png", "conversations": turns}) for i in range(3)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(["{torn", *records]) + "\n")
    (tmp_path / "1.png").unlink()
    config = toy_config(tmp_path)
    data = [SourceConfig(path=str(tmp_path / "held_out.jsonl"))]
    run = write_run(tmp_path, eval=dataclasses.replace(config.eval, data=data))
    found = held_out_samples(toy_config(tmp_path, eval=dataclasses.replace(config.eval, data=data)))
    assert len(found) == 3 and "held_out.jsonl[0]: not valid JSON" in capsys.readouterr().err
    assert len(telling_pictures(found, 3)) == 1  # the picture that is left, once
    last = [prediction(0, "one\u2028two", 0.0) | dict(name=name) for name in found]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in last)
    (run / "predictions" / "III.jsonl").write_text(lines)
    assert write_report(run, pictures=False)[0].read_text().count("one\u2028two") == 3


def test_results_of_other_programs_are_shown(tmp_path):
    run = write_run(tmp_path)
    (run / "sweep").mkdir()
    table = dict(text="Accuracy against the cap.", header=["cap", "score"], rows=[["16", "12.5"]])
    (run / "sweep" / "table.json").write_text(json.dumps(table))
    html = write_report(run, pictures=False)[0].read_text()
    assert "Resolution sweep" in html and "12.5" in html and "Frozen probes" not in html
    for name in ("digits", "shapes-linear"):
        (run / "probes" / name).mkdir(parents=True)
        table = dict(title=f"Trial: {name}", text="", header=["encoder", "score"], rows=[["III", "99.5 ± 0.5"]])
        (run / "probes" / name / "table.json").write_text(json.dumps(table))
    Image.new("RGB", (4, 4)).save(run / "probes" / "shapes-linear" / "examples.png")
    html, markdown = (page.read_text() for page in write_report(run, pictures=False))
    assert html.count("<h3>Trial: ") == 2 and html.count("99.5 ± 0.5") == 2
    assert "](probes/shapes-linear/examples.png)" in markdown


def test_not_a_run(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"config\.json"):
        write_report(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "config.json" in capsys.readouterr().err


def test_examples_take_the_kinds_in_turn():
    predictions = [dict(name=str(i), question_type=kind) for i, kind in enumerate("aaabbc")]
    assert choose_names(predictions, 5) == ["0", "3", "5", "1", "4"]
    assert choose_names(predictions, 99) == ["0", "3", "5", "1", "4", "2"]
    assert choose_names([], 3) == []


def test_pictures_that_tell_something():
    """The squarest, one of each kind before a second of any; text and repeated pictures do not count."""
    sizes = [(90, 10), (40, 40), (40, 40), (30, 20), (10, 80), (20, 21)]

    def sample(name: str, kind: str, images: list[Image.Image]) -> Sample:
        return Sample(name=name, messages=[Message(role="user", text="?", images=images)], question_type=kind)

    samples = [sample(str(i), "ab"[i % 2], [Image.new("RGB", size)]) for i, size in enumerate(sizes)]
    text = sample("text", "c", [])
    assert [picture.size for picture in telling_pictures(HeldOutSamples([*samples, text]), 2)] == [(40, 40), (20, 21)]
    assert telling_pictures(HeldOutSamples([text]), 2) == []


def test_held_out_pictures_are_not_kept():
    """A benchmark's samples hold their encoded pictures: only those that are shown may be in memory."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Held:
        def __call__(self) -> Image.Image:
            return Image.new("RGB", (20, 20), "red")

    class Benchmark:
        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> Sample:
            nonlocal most
            picture = Held()
            alive.add(picture)
            most = max(most, len(alive))
            message = Message(role="user", text="?", images=[picture])
            return Sample(name=f"held out {index}", messages=[message], question_type="a")

    samples = HeldOutSamples(Benchmark())
    assert len(samples) == len(samples.with_pictures) == 50 and list(samples)[7] == "held out 7"
    assert samples["held out 7"].name == "held out 7" and "held out 50" not in samples
    assert len(telling_pictures(samples, 3)) == 1 and most <= 3


def test_page_in_both_forms(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    example = Example([tmp_path / "a.png"], "a & b?", ["x", "x", "y"], [("now", "", 0.0)])
    blocks = [Heading("T & U"), Table(["n", "a|b"], [["1", "c|d"]], total=True), Gallery([example])]
    html, markdown = (page.read_text() for page in write_page(blocks, "title", tmp_path, "page"))
    assert "T &amp; U" in html and "a &amp; b?" in html and "x / y" in html and "(nothing)" in html and 'class="total"' in html
    assert "| 1 | c\\|d |" in markdown and "![](a.png)" in markdown


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    save_toy_models(folder)
    return VisionEncoder.from_pretrained(folder / "vision", pos_mode="abs+rope").eval()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_feature_colours(encoder):
    colours = feature_colours(encoder, noise(48, 32))
    assert colours.shape == (8, 12, 3) and colours.min() == 0 and colours.max() == 1


def test_centre_attention_is_that_of_the_centre(encoder):
    """With keys equal to queries, every patch attends to itself most: so does the one in the centre, at its own place."""
    width = encoder.config.width
    with torch.no_grad():
        encoder.blocks[-1].attn.qkv.weight[: 2 * width] = 3 * torch.eye(width).repeat(2, 1)
        encoder.blocks[-1].attn.qkv.bias[: 2 * width] = 0
    attention = centre_attention(encoder, noise(48, 32))
    assert attention.shape == (8, 12)
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    assert np.unravel_index(attention.argmax(), attention.shape) == (4, 6)


def test_a_kind_of_question_that_some_caps_have_no_room_for(tmp_path):
    def scores(**kinds):
        table = {name: dict(score=score, count=count, metric="anls") for name, (score, count) in kinds.items()}
        return table | {"overall": dict(score=0.5, count=sum(c for _, c in kinds.values()), metric="anls")}

    write_sweep({8: scores(plain=(0.5, 3)), 64: scores(album=(0.25, 2), plain=(0.75, 3))}, tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["rows"] == [["album", "-", "25.0"], ["plain", "50.0", "75.0"], ["overall", "50.0", "50.0"]]
    assert "on 5 held-out questions" in table["text"] and "rows do not compare there: 3 at 8." in table["text"]
    write_sweep({8: scores(plain=(0.5, 3))}, tmp_path)
    assert "compare" not in json.loads((tmp_path / "table.json").read_text())["text"]


def test_names_with_dollar_signs_are_drawn(tmp_path):
    """matplotlib reads what stands between two as mathematics, and raises where it is none."""
    name = "$# or #$"
    entry = {name: dict(score=0.5, count=2, metric="anls"), "overall": dict(score=0.5, count=2, metric="anls")}
    steps = dict(lr=dict(vision=1.0), grad_norm=dict(vision=1.0), token_loss=1.0, images_per_s=1.0, tokens_per_s=1.0)
    records = [dict(event="train", step=1, stage=name, **steps), dict(event="evaluation", label=name, scores=entry)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(plot_run(tmp_path / "metrics.jsonl", tmp_path)) == 5
    write_sweep({8: entry}, tmp_path)
