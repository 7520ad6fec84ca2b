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
from comp.tiny.digits import form, load_scans, number_strip
from comp.tiny.pages import KINDS, TinyPages, random_scene
from comp.tiny.recipe import ASSETS
from comp.train.trainer import Trainer


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
    samples = [TinyPages("heldout", 52)[i] for i in range(52)]
    assert Counter(s.question_type for s in samples) == dict.fromkeys(KINDS, 4)
    assert all(len(s.messages) == 2 and s.answers == [s.messages[1].text] for s in samples)


def test_pages_come_in_many_sizes_and_ratios():
    sizes = {image(TinyPages("train", 100)[i]).size for i in range(100)}
    ratios = [w / h for w, h in sizes]
    assert len(sizes) > 80 and min(ratios) < 0.5 and max(ratios) > 3


@pytest.mark.parametrize("make_scene", [number_strip, form, bar_chart])
def test_answers_follow_from_the_marks_on_the_page(make_scene):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = make_scene(rng, "train")
        lines = [[m.text for m in line] for _, line in itertools.groupby(scene.draw().marks, key=lambda m: m.line)]
        expected = answers_from_lines(make_scene, lines)
        for question in scene.questions:
            assert question.answer == expected(question), question


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


def test_typed_pages_hold_the_answers():
    rng = np.random.default_rng(2)
    for _ in range(20):
        scene = number_strip(rng, "train")
        number = next(q.answer for q in scene.questions if q.kind == "number")
        assert "".join(pretrain.type_out(scene.draw().marks, rng).split()) == number


def test_window_labels_say_which_patch_holds_a_centre():
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(30):
        drawing = number_strip(rng, "train").draw()
        pixels, labels = pretrain.window(drawing, rng)
        assert pixels.size == (64, 64) and labels.shape == (64, len(pretrain.CLASSES))
        assert labels.sum() <= len(drawing.marks)
        assert {pretrain.CLASSES[c] for c in labels.nonzero()[1]} <= {mark.text for mark in drawing.marks}
        found += int(labels.sum())
    assert found > 30


def test_recipe_follows_the_stages_of_comp():
    first, fixed, native, last = RECIPES["tiny"]().stages
    assert first.trainable == ("adapter",) and not first.rope and first.resolution == "pretrain"
    assert all(stage.rope and set(stage.trainable) == {"vision", "adapter", "language"} for stage in (fixed, native, last))
    assert isinstance(fixed.resolution, int) and native.resolution is None and last.resolution is None
    assert [stage.alignment.mode for stage in (first, fixed, native)] == ["sinkhorn"] * 3 and last.alignment is None


def test_shortened_run_reports_scores_and_baselines(tmp_path):
    config = apply_overrides(
        RECIPES["tiny"](),
        [
            f"output_dir={tmp_path}",
            "tensorboard=false",
            "eval.data.0.arguments.size=13",
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
