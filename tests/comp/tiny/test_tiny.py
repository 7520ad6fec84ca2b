"""The default recipe: its pages and questions, its pre-trained start, and a shortened run."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from comp import VisionEncoder
from comp.config_io import apply_overrides
from comp.data.template import SPECIAL_TOKENS, load_tokenizer
from comp.recipes import RECIPES
from comp.tiny import pretrain
from comp.tiny.charts import COLOURS, bar_chart, load_tables
from comp.tiny.digits import form, grid, load_scans, number_strip
from comp.tiny.pages import KINDS, MARKS, TRANSCRIPT, ShortStrips, TinyPages, random_scene
from comp.tiny.recipe import ASSETS
from comp.train.trainer import Trainer

pytestmark = pytest.mark.slow


def test_scans_are_split_by_image():
    scans = {split: [m.tobytes() for masks in load_scans(split).values() for m in masks] for split in ("train", "heldout")}
    assert len(scans["train"]) + len(scans["heldout"]) == 1797
    assert len(scans["heldout"]) == 359
    assert not set(scans["train"]) & set(scans["heldout"])


def test_tables_are_split_by_table():
    names = {split: {table.name for table in load_tables(split)} for split in ("train", "heldout")}
    assert names["heldout"] == {"wine", "linnerud"}
    assert names["train"] == {"iris", "diabetes", "breast_cancer", "stocks"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pages_depend_on_split_seed_and_index_alone(split):
    first, again, other = TinyPages(split, 40), TinyPages(split, 40), TinyPages(split, 40, seed=1)
    same = 0
    for index in reversed(range(40)):
        a, b, c = first[index], again[index], other[index]
        assert [m.text for m in a.messages] == [m.text for m in b.messages]
        assert image(a).tobytes() == image(b).tobytes() == image(a).tobytes()
        same += image(a).tobytes() == image(c).tobytes()
    assert same == 0


def test_heldout_asks_every_kind_equally_often_and_once():
    samples = [TinyPages("heldout", 64)[i] for i in range(64)]
    assert Counter(s.question_type for s in samples) == dict.fromkeys(KINDS, 4)
    assert all(len(s.messages) == 2 and s.answers == [s.messages[1].text] for s in samples)


def test_pages_come_in_many_sizes_and_ratios():
    sizes = {image(TinyPages("train", 100)[i]).size for i in range(100)}
    ratios = [w / h for w, h in sizes]
    assert len(sizes) > 80 and min(ratios) < 0.5 and max(ratios) > 3


@pytest.mark.parametrize("make_scene", [number_strip, form, grid, bar_chart])
def test_answers_follow_from_the_marks_on_the_page(make_scene):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = make_scene(rng, "train")
        lines = [[m.text for m in line] for _, line in itertools.groupby(scene.draw().marks, key=lambda m: m.line)]
        expected = answers_from_lines(make_scene, lines)
        for question in scene.questions:
            assert question.answer == expected(question), question
        strip = make_scene is number_strip
        assert scene.text == ("" if strip else "\n").join("".join(line) for line in lines)


def answers_from_lines(make_scene, lines):
    """A second way to the answers: from what is on the page, line by line."""
    if make_scene is number_strip:
        digits = [int(d) for line in lines for d in line]
        order = ("first", "second", "third", "fourth", "fifth", "sixth")
        return lambda q: {
            "number": lambda: "".join(map(str, digits)),
            "position": lambda: str(digits[order.index(q.text[:-1].split()[-1])]),
            "count": lambda: str(len(digits)),
            "largest": lambda: str(sorted(digits)[-1]),
            "smallest": lambda: str(sorted(digits)[0]),
            "sum": lambda: str(sum(digits)),
        }[q.kind]()
    if make_scene is grid:
        return lambda q: answer_by_place(lines, q.text.rstrip("?").replace(",", "").split())
    numbers = {line[0]: int("".join(line[1:])) for line in lines}
    ranked = sorted(numbers, key=numbers.get)
    asked = [word for line in lines for word in line[:1]]
    return lambda q: {
        "row": lambda: str(numbers[q.text[-2]]),
        "boxes": lambda: str(len(numbers)),
        "largest box": lambda: ranked[-1],
        "bar value": lambda: str(next(numbers[colour] for colour in asked if f" {colour} " in q.text)),
        "bars": lambda: str(len(numbers)),
        "highest": lambda: ranked[-1],
        "lowest": lambda: ranked[0],
    }[q.kind]()


def answer_by_place(lines, words):
    """What is in row r, column c, or beside, above or below the digit that is named last."""
    if "row" in words:
        return lines[int(words[-3]) - 1][int(words[-1]) - 1]
    ((row, column),) = [(i, j) for i, line in enumerate(lines) for j, digit in enumerate(line) if digit == words[-1]]
    down, right = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[words[3]]
    assert row + down >= 0 and column + right >= 0
    return lines[row + down][column + right]


def test_digits_of_a_grid_differ_so_that_place_alone_decides():
    rng = np.random.default_rng(4)
    shapes = set()
    for _ in range(60):
        lines = grid(rng, "train").text.split("\n")
        assert len({*"".join(lines)}) == len("".join(lines)) and len({len(line) for line in lines}) == 1
        shapes.add((len(lines), len(lines[0])))
    assert shapes == {(2, 2), (2, 3), (2, 4), (3, 2), (3, 3)}


@pytest.mark.parametrize("pages", [TinyPages("train", 30, transcript=True), ShortStrips(30, transcript=True)])
def test_a_transcript_comes_last_and_is_the_text_of_the_alignment_loss(pages):
    for sample in (pages[i] for i in range(30)):
        *others, question, answer = sample.messages
        assert (question.text, answer.text) == (TRANSCRIPT, sample.text) and len(others) // 2 <= 3
        assert all(message.text != TRANSCRIPT for message in others) and image(sample) is not None
    assert all(TinyPages("train", 5)[i].text is None for i in range(5))


def test_marks_lie_where_something_is_drawn():
    rng = np.random.default_rng(1)
    for _ in range(60):
        drawing = random_scene(rng, "heldout").draw()
        pixels = np.asarray(drawing.image, dtype=int)
        for mark in drawing.marks:
            x, y = round(mark.x), round(mark.y)
            patch = pixels[max(y - 7, 0) : y + 8, max(x - 7, 0) : x + 8].reshape(-1, 3)
            if mark.text in COLOURS:
                assert (patch == COLOURS[mark.text]).all(1).any(), mark
            else:
                assert patch.sum(1).min() < patch.sum(1).max() - 120, mark


def test_committed_start_is_small_and_loads():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in files}
    assert all(path.stat().st_size < 2 * 2**20 for path in files)
    encoder = VisionEncoder.from_pretrained(str(ASSETS / "vision"))
    assert encoder.config.grid_size * encoder.config.patch_size == pretrain.IMAGE_SIZE
    assert encoder.pos_mode == "abs" and encoder.adapter is None
    language = AutoModelForCausalLM.from_pretrained(ASSETS / "language", dtype=torch.float32)
    tokenizer = load_tokenizer(str(ASSETS / "language"))
    assert len(tokenizer) == language.get_input_embeddings().num_embeddings
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())
    text = "Größe 1234,\n  blue?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_pretraining_script_writes_what_the_recipe_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "READING_STEPS", 1)
    pretrain.pretrain_vision(tmp_path / "vision", steps=2, seed=0, batch_size=2)
    pretrain.pretrain_language(tmp_path / "language", steps=2, seed=0, batch_size=2, num_pages=200)
    for part in ("vision", "language"):
        made, committed = sorted(p.name for p in (tmp_path / part).iterdir()), sorted(p.name for p in (ASSETS / part).iterdir())
        assert made == committed
    VisionEncoder.from_pretrained(str(tmp_path / "vision"))


def test_a_continued_language_model_keeps_what_it_knows_and_gets_words(tmp_path):
    pretrain.pretrain_language(tmp_path / "language", steps=1, seed=0, batch_size=2, num_pages=100)
    tokenizer = load_tokenizer(str(tmp_path / "language"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "language", dtype=torch.float32)
    rows, size = model.get_input_embeddings().weight.detach().clone(), len(tokenizer)
    word = next(w for w in pretrain.WORDS if len(tokenizer(w, add_special_tokens=False)["input_ids"]) > 1)
    pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
    pretrain.add_words(tokenizer, model, pretrain.WORDS)
    assert torch.equal(model.get_input_embeddings().weight[:size], rows)
    (new,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert new >= size and torch.equal(model.get_input_embeddings().weight[new], rows[pieces].mean(0))
    assert tokenizer.decode(tokenizer("the system reads row 2").input_ids) == "the system reads row 2"
    pretrain.pretrain_language(tmp_path / "language", steps=1, seed=1, batch_size=2, num_pages=20, continued=True)
    assert len(load_tokenizer(str(tmp_path / "language"))) == len(tokenizer)


def test_typed_pages_hold_the_answers():
    rng = np.random.default_rng(2)
    for _ in range(20):
        scene = number_strip(rng, "train")
        number = next(q.answer for q in scene.questions if q.kind == "number")
        assert "".join(pretrain.type_out(scene.draw().marks, rng).split()) == number


def test_whole_pages_are_squeezed_and_labelled_by_patch():
    rng = np.random.default_rng(3)
    for _ in range(30):
        drawing = random_scene(rng, "train").draw()
        pixels, labels = pretrain.squeezed(drawing)
        assert pixels.size == (64, 64) and labels.shape == (64, len(MARKS))
        assert {MARKS[c] for c in labels.nonzero()[1]} == {mark.text for mark in drawing.marks}
    strip = number_strip(rng, "train").draw()
    _, labels = pretrain.squeezed(strip)
    first, width, height = strip.marks[0], *strip.image.size
    patch = int(8 * first.y / height) * 8 + int(8 * first.x / width)
    assert labels[patch, MARKS.index(first.text)] == 1


def test_recipe_follows_the_stages_of_comp():
    first, fixed, native, last = RECIPES["tiny"]().stages
    assert first.trainable == ("adapter",) and not first.rope and first.resolution == "pretrain"
    assert all(stage.rope and set(stage.trainable) == {"vision", "adapter", "language"} for stage in (fixed, native, last))
    assert isinstance(fixed.resolution, int) and native.resolution is None and last.resolution is None
    assert [stage.alignment.mode for stage in (first, fixed, native)] == ["sinkhorn"] * 3 and last.alignment is None
    aligned = [source for stage in (first, fixed, native) for source in stage.data]
    assert all(source.arguments["transcript"] for source in aligned), "the alignment text is what the page says"


def test_shortened_run_reports_scores_and_baselines(tmp_path):
    config = apply_overrides(
        RECIPES["tiny"](),
        [
            f"output_dir={tmp_path}",
            "tensorboard=false",
            "eval.data.0.arguments.size=16",
            "eval.encoder=[]",
            *(f"stages.{i}.{field}" for i in range(4) for field in ("max_steps=1", "batch_size=4", "data.0.arguments.size=50")),
        ],
    )
    summary = Trainer(config).run()
    assert [e["label"] for e in summary["evaluations"]] == ["before", "I", "II-a", "II-b", "III"]
    for entry in summary["evaluations"]:
        assert set(entry["scores"]) == {*KINDS, "overall"}
    assert len(summary["baselines"]) >= 2
    assert Path(tmp_path, "tiny", "summary.json").is_file()


def image(sample):
    return sample.messages[0].images[0]()
