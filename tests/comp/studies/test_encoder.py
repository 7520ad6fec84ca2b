"""Measures of a run's towers: the reader of frozen towers, the table of before and after, and the alignment loss at the
start."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from toy import toy_config

import train as program
from comp.build import load_tower
from comp.config import ConfigError
from comp.config_io import apply_overrides
from comp.data.encode import SampleEncoder
from comp.eval import patches, retrieval
from comp.model import Adapter
from comp.studies import alignment, encoder
from comp.studies.alignment import examine, sharpness
from comp.studies.readers import reading_config, reading_loss
from comp.train.trainer import Trainer


@pytest.fixture
def few_pages(monkeypatch):
    monkeypatch.setattr(retrieval, "CANDIDATES", 24)
    monkeypatch.setattr(retrieval, "FIT_PAGES", 40)
    monkeypatch.setattr(encoder, "TEST_PAGES", 10)
    monkeypatch.setattr(patches.probe_tower, "__defaults__", (patches.NATIVE, (12, 10)))


def test_a_reader_changes_neither_tower_nor_outcome(toy_models):
    config, tower = toy_config(toy_models), load_tower(toy_config(toy_models).vision)
    tower.adapter = Adapter(32, 32)  # of another run: not to be used
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    loss = reading_loss(config, tower, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    with torch.no_grad():
        for parameter in tower.adapter.parameters():
            parameter.zero_()
    assert reading_loss(config, tower, steps=3) == loss
    assert reading_loss(config, tower, steps=3, seed=1) != loss
    assert reading_loss(config, tower, steps=12) < loss, "it learns"


def test_another_tower_gives_another_loss(toy_models):
    config, tower = toy_config(toy_models), load_tower(toy_config(toy_models).vision)
    seeing = reading_loss(config, tower, steps=2)
    with torch.no_grad():
        tower.patch_embed.weight.zero_()
    assert reading_loss(config, tower, steps=2) != seeing


def test_the_reader_reads_a_tower_with_the_positions_it_has(toy_models):
    config, tower = toy_config(toy_models), load_tower(toy_config(toy_models).vision)
    for mode, rope in (("abs", False), ("abs+rope", True), ("rope", True)):
        tower.pos_mode = mode
        (stage,) = reading_config(config, tower, 5).stages
        assert stage.rope == rope and stage.trainable == ("adapter", "language") and stage.max_steps == 5
        assert not rope or reading_config(config, tower, 5).vision.pos_mode == mode


@pytest.mark.slow
def test_a_run_measures_its_towers_and_prints_them(toy_models, few_pages, tmp_path, monkeypatch, capsys):
    config = toy_config(toy_models, output_dir=str(tmp_path))
    config.eval = dataclasses.replace(config.eval, encoder=("II-b", "III"), reading_steps=2)
    monkeypatch.setitem(program.RECIPES, "toy", lambda: config)
    with patch("comp.train.trainer.plot_run"):
        assert program.main(["--recipe", "toy"]) == 0
    printed = capsys.readouterr().out
    assert "the vision tower, frozen" in printed and "answers read off the frozen tower, nats" in printed
    left = json.loads((tmp_path / "toy" / "encoder" / "table.json").read_text())
    assert left["header"] == ["frozen tower", "before", "II-b", "III", "change"]
    assert set(left["scores"]) == {"before", "II-b", "III"}
    for scores in left["scores"].values():
        assert set(map(int, scores["patches"])) == set(encoder.CAPS)
        assert all(0 <= value <= 1 for value in scores["patches"].values()) and scores["reading_loss"] > 0
    assert left["scores"]["before"]["retrieval_adapter"] is None, "the start has no adapter"
    assert left["scores"]["III"]["retrieval_adapter"] > 0
    assert (tmp_path / "toy" / "encoder" / "encoder.png").stat().st_size > 10_000
    again = tmp_path / "toy"
    start = str(toy_models / "vision")
    assert encoder.main([str(again), "--stages", "III", "--towers", start, "--reading-steps", "0"]) == 0
    table = json.loads((again / "encoder" / "table.json").read_text())
    assert table["header"] == ["frozen tower", "before", start, "III", "change"]
    assert table["scores"]["before"] == table["scores"][start], "the same tower has the same scores"
    assert table["scores"]["III"]["patches"] == left["scores"]["III"]["patches"]


def test_a_broken_question_is_left_out_of_the_reading_loss(toy_models, monkeypatch, capsys):
    config, tower = toy_config(toy_models), load_tower(toy_config(toy_models).vision)
    encode, encoded = SampleEncoder.encode, []
    noting = lambda self, sample, **seed: encoded.append(sample.name) or encode(self, sample, **seed)  # noqa: E731
    monkeypatch.setattr(SampleEncoder, "encode", noting)
    whole = reading_loss(config, tower, steps=1, num_questions=4)
    assert encoded[-4:] == [f"rectangle {number}" for number in range(100, 104)] and len(encoded) == 8 + 4, "once each"
    arguments = config.eval.data[0].arguments
    arguments["broken"] = (4, 5)
    assert reading_loss(config, tower, steps=1) == whole
    assert "left out of the reading loss: rectangle 104: image /nowhere/broken.png" in capsys.readouterr().err
    arguments["broken"] = tuple(range(6))
    with pytest.raises(ConfigError, match="none of the held-out samples can be used"):
        reading_loss(config, tower, steps=1)


def test_what_cannot_be_measured_at_the_end_is_refused_at_the_beginning(toy_models, tmp_path, monkeypatch, capsys):
    config = toy_config(toy_models, output_dir=str(tmp_path))
    monkeypatch.setitem(program.RECIPES, "toy", lambda: config)
    alone = ["stages.*.trainable=[adapter]", "stages.*.optim.lr_language=0", "eval.encoder=[III]"]
    assert program.main(["--recipe", "toy", *alone]) == 2
    said = capsys.readouterr().err
    assert "no stage has an optim.lr_language; eval.reading_steps=0 measures the rest" in said
    stream = ["stages.3.data=[{path: shards/*.tar}]", "eval.encoder=[II-b]"]
    assert program.main(["--recipe", "toy", *stream]) == 2
    assert "learn from the data of stage III, which has a stream" in capsys.readouterr().err
    assert not (tmp_path / "toy").exists()
    encoder.check_measures(apply_overrides(config, [*stream, "eval.reading_steps=0"]))


@pytest.mark.slow
def test_the_summary_is_there_whatever_becomes_of_the_measures(toy_models, tmp_path):
    def measure(*arguments):
        raise KeyboardInterrupt

    config = toy_config(toy_models, output_dir=str(tmp_path), stages=toy_config(toy_models).stages[-1:])
    with patch("comp.train.trainer.plot_run"), pytest.raises(KeyboardInterrupt):
        Trainer(config, measure=measure).run()
    assert json.loads((tmp_path / "toy" / "summary.json").read_text())["steps"] == 2


def test_stages_to_measure_must_exist(toy_models):
    with pytest.raises(ConfigError, match=r"eval\.encoder must be one of 'I', 'II-a', 'II-b', 'III', got 'IV'"):
        apply_overrides(toy_config(toy_models), ["eval.encoder=[IV]"])


def test_the_error_of_a_change_is_paired():
    def scores(shift: float) -> encoder.TowerScores:
        draws, ranks = torch.tensor([0.4, 0.5, 0.6]) + shift, torch.tensor([0.1, 0.5, 1.0])
        return encoder.TowerScores({8: 0.2, 128: 0.5 + shift}, 0.4, None, None, draws, ranks)

    _, rows = encoder.rows_of({"before": scores(0.0), "after": scores(0.25)})
    assert rows[0] == ["marks by patch, native size, mAP %", "50.0", "75.0", "+25.0 ± 0.0"]
    assert rows[1][1:] == ["20.0", "20.0", "+0.0"] and rows[-1][1:] == ["-", "-", "-"]


# --- the alignment loss at the start ------------------------------------------------------------------------------------------


def test_sharpness_by_hand():
    two_words = sharpness(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert two_words.entropy == 0.0 and two_words.information == pytest.approx(math.log(2)) and two_words.top_share == 0.5
    same = sharpness(torch.tensor([[0.75, 0.25], [0.75, 0.25]]))
    assert same.information == pytest.approx(0.0, abs=1e-6) and same.top_word == 0
    assert same.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_force_grows_with_the_weight_and_entropy_with_the_temperature(toy_models):
    def row(*changes):
        overrides = [f"stages.{i}.alignment.{change}" for i in range(3) for change in changes]
        header, rows = examine(apply_overrides(toy_config(toy_models), overrides))
        assert [r[0] for r in rows] == ["I", "II-a", "II-b"]
        return {name: rows[2][i] for i, name in enumerate(header)} | {"vision in I": rows[0][header.index("force vision")]}

    one, double = row(), row("weight=0.1")
    assert float(double["force adapter"]) == pytest.approx(2 * float(one["force adapter"]), abs=0.02)
    assert double["cosine adapter"] == one["cosine adapter"] and one["vision in I"] == "nan"
    soft = row("epsilon=0.5")
    assert float(soft["entropy"]) > float(one["entropy"])
    contrastive = row("mode=contrastive")
    assert contrastive["entropy"] == "-" and float(contrastive["force adapter"]) > 0


def test_the_first_batch_is_one_that_can_be_read(toy_models, capsys):
    config = toy_config(toy_models)
    for stage in config.stages:
        stage.data[0].arguments["broken"] = (0, 2)
    _, rows = examine(config, 3)
    assert len(rows) == 3 and capsys.readouterr().err.count("skipped rectangle 0: image /nowhere/broken.png") == 1
    for stage in config.stages:
        stage.data[0].arguments["broken"] = tuple(range(24))
    with pytest.raises(ConfigError, match=r"none of \d+ samples has an image and an answer"):
        examine(config, 3)


def test_the_command_prints_a_row_per_stage(toy_models, monkeypatch, capsys):
    monkeypatch.setitem(alignment.RECIPES, "toy", lambda: toy_config(toy_models))
    scores, dropping = alignment.text_scores, []
    monkeypatch.setattr(
        alignment, "text_scores", lambda m, *rest: dropping.append(m.language_model.training) or scores(m, *rest)
    )
    assert alignment.main(["--recipe", "toy", "--samples", "4"]) == 0
    assert dropping == ["language" in stage.trainable for stage in toy_config(toy_models).stages if stage.alignment]
    printed = capsys.readouterr().out
    assert printed.count("sinkhorn") == 3 and "epsilon at 2.08 nats" in printed
    with pytest.raises(SystemExit):
        alignment.main(["--recipe", "toy", "stages.*.alignment=null"])
    assert "no stage of this configuration has an alignment loss" in capsys.readouterr().err
