"""Ablations: what a variant changes, sharing of the first stage, going on after an interruption, and the table's arithmetic."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from toy import toy_config

from comp.config import EvalConfig
from comp.config_io import differences, to_dict
from comp.eval import patches, retrieval
from comp.eval.patches import NATIVE
from comp.studies.ablations import run as ablations
from comp.studies.ablations.run import (
    BASELINE,
    MAIN_ARMS,
    VARIANTS,
    baseline,
    claimed,
    collect,
    configure,
    read_results,
    run_all,
    stage_one_key,
)
from comp.studies.ablations.table import METRICS, difference, main, markdown, values_by_variant

DOCS = Path(__file__).parents[3] / "docs"
CHANGED = {  # written out by hand: what each variant may differ in, beside its name
    "align-off": {"stages.0.alignment", "stages.1.alignment"},
    "table-native": {"stages.1.rope"},
    "rope-native": {"vision.pos_mode"},
    "crope-fixed": {"stages.1.resolution"},
    "table-fixed": {"stages.1.rope", "stages.1.resolution"},
    "rope-fixed": {"vision.pos_mode", "stages.1.resolution"},
    "align-softmax": {"stages.0.alignment.mode", "stages.1.alignment.mode"},
    "align-literal": {"stages.0.alignment.mode", "stages.1.alignment.mode"},
    "align-released": {"stages.0.alignment.mode", "stages.1.alignment.mode"},
    "align-contrastive": {f"stages.{i}.alignment.{field}" for i in range(2) for field in ("mode", "temperature", "weight")},
    "align-paper": {f"stages.{i}.alignment.{field}" for i in range(2) for field in ("epsilon", "temperature", "weight")},
    "align-uniform": {"stages.0.alignment.prior", "stages.1.alignment.prior"},
    "align-learned": {"stages.0.alignment.prototype_source", "stages.1.alignment.prototype_source"},
    "tower-frozen": {"stages.0.alignment", "stages.1.alignment", "stages.1.trainable"},
    "rope-from-I": {"stages.0.rope"},
    "rope-from-I-tower": {"stages.0.rope", "stages.0.trainable", "stages.0.optim.lr_vision"},
    "raster-crope": {"vision.abs_pos_order"},
    "raster-table": {"vision.abs_pos_order", "stages.1.rope"},
    "tower": {"stages.0.trainable", "stages.0.optim.lr_vision"},
}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != BASELINE])
def test_a_variant_differs_in_exactly_the_named_fields(name, tmp_path):
    a, b = to_dict(baseline(5, tmp_path)), to_dict(configure(name, 5, tmp_path))
    assert set(differences(a, b)) == CHANGED[name] | {"name"}


def test_seeds_change_the_seed_alone(tmp_path):
    a, b = to_dict(configure("rope-native", 0, tmp_path)), to_dict(configure("rope-native", 1, tmp_path))
    assert differences(a, b) == ["name", "seed"]


def test_who_shares_the_first_stage(tmp_path):
    keys = {name: stage_one_key(configure(name, 0, tmp_path)) for name in VARIANTS}
    sharing = {name for name, key in keys.items() if key == keys[BASELINE]}
    assert sharing == {BASELINE, *(f"{a}-{b}" for a in ("table", "rope", "crope") for b in ("native", "fixed"))} - {
        "crope-native"
    }
    assert keys["raster-crope"] == keys["raster-table"] != keys[BASELINE]
    assert keys["tower"] != keys["rope-from-I-tower"]
    assert stage_one_key(configure(BASELINE, 1, tmp_path)) != keys[BASELINE]
    rope_first = dataclasses.replace(configure("rope-from-I", 0, tmp_path))
    without_table = dataclasses.replace(rope_first, vision=dataclasses.replace(rope_first.vision, pos_mode="rope"))
    assert stage_one_key(rope_first) != stage_one_key(without_table), "with RoPE on, the first stage depends on the mode"


# --- runs of a toy model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(toy_models):
    """(seed, folder) -> two short stages of the toy recipe, in place of `baseline`."""

    def base(seed, folder):
        config = toy_config(toy_models, seed=seed, output_dir=str(folder), eval=EvalConfig())
        one, _, two, _ = config.stages
        stages = [dataclasses.replace(one, max_steps=3), dataclasses.replace(two, name="II", max_steps=3)]
        checkpoint = dataclasses.replace(config.checkpoint, every_steps=2, keep=100)
        return dataclasses.replace(config, stages=stages, checkpoint=checkpoint)

    with patch("comp.train.trainer.plot_run"):
        yield base


@pytest.fixture(autouse=True)
def few_pages(monkeypatch):
    monkeypatch.setattr(retrieval, "CANDIDATES", 12)
    monkeypatch.setattr(retrieval, "FIT_PAGES", 20)
    monkeypatch.setattr("comp.studies.encoder.TEST_PAGES", 6)
    monkeypatch.setattr(patches.probe_tower, "__defaults__", (NATIVE, (8, 6)))


def measured(folder, name, seed=0):
    (result,) = (r for r in read_results(folder) if (r["variant"], r["seed"]) == (name, seed))
    assert set(METRICS) < set(result)
    return {key: value for key, value in result.items() if key != "cpu_seconds"}


def trained_stages(folder, name):
    records = [json.loads(line) for line in (folder / f"{name}-0" / "metrics.jsonl").read_text().splitlines()]
    return [r["stage"] for r in records if r["event"] == "train"]


def test_a_shared_first_stage_changes_nothing(toy, tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    run_all(shared, [BASELINE], [0], base=toy, num_questions=3)
    with patch.object(ablations, "start_after_stage_one", wraps=ablations.start_after_stage_one) as start:
        run_all(shared, ["table-native"], [0], base=toy, num_questions=3)
    assert start.call_count == 1
    run_all(alone, ["table-native"], [0], base=toy, num_questions=3)
    assert measured(shared, "table-native") == measured(alone, "table-native") != measured(shared, BASELINE)
    assert trained_stages(shared, "table-native") == trained_stages(alone, "table-native") == ["I"] * 3 + ["II"] * 3
    assert [p.name for p in (shared / "table-native-0" / "checkpoints").iterdir()] == ["step-00000003"]


def test_an_interrupted_run_goes_on_and_a_finished_one_is_kept(toy, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_all(whole, ["align-off"], [0], base=toy, num_questions=3)
    with patch.object(ablations, "answer_loss", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run_all(broken, ["align-off"], [0], base=toy, num_questions=3)
    assert read_results(broken) == []
    with patch("comp.train.trainer.train_step", side_effect=AssertionError("every step was done before")):
        run_all(broken, ["align-off"], [0], base=toy, num_questions=3)
    assert measured(broken, "align-off") == measured(whole, "align-off")
    with patch.object(ablations, "train_and_score", side_effect=AssertionError("the result is there")):
        run_all(broken, ["align-off"], [0], base=toy, num_questions=3)


def test_a_claim_is_exclusive_and_ends(tmp_path):
    with claimed(tmp_path / "a") as first, claimed(tmp_path / "a") as second, claimed(tmp_path / "b") as other:
        assert (first, second, other) == (True, False, True)
    with claimed(tmp_path / "a") as again:
        assert again


# --- the table ----------------------------------------------------------------------------------------------------------------


def made_up(losses):
    """Results with the given {variant: [loss of seed 0, of seed 1, ...]}."""
    variants = {
        name: dict(group="" if name == BASELINE else "a group", label=f"label of {name}", overrides=[]) for name in losses
    }
    others = dict.fromkeys(set(METRICS) - {"loss"}, 0.25)
    runs = [
        dict(variant=name, seed=seed, loss=loss, by_type={}, visual_tokens_per_image=20.0, cpu_seconds=1.0, **others)
        for name, row in losses.items()
        for seed, loss in enumerate(row)
    ]
    pairs = [("a", "b"), ("a", "never run"), ("a", BASELINE)]
    return dict(schedule=[], questions=13, variants=variants, pairs=pairs, runs=runs)


def test_differences_are_paired_by_seed():
    values = values_by_variant(made_up({BASELINE: [1.0, 2.0, 3.0], "a": [1.5, 2.6, 3.7], "b": [5.0]}), "loss")
    found = difference(values, "a")
    assert found.by_seed == pytest.approx({0: 0.5, 1: 0.6, 2: 0.7})
    # Student's t with 2 degrees of freedom: 4.3027 at 97.5 %
    assert found.mean == pytest.approx(0.6) and found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    single = difference(values, "b")
    assert single.by_seed == {0: 4.0} and single.half_width is None
    assert difference(values, BASELINE) is None
    assert difference(values, "b", against="a").by_seed == {0: 3.5} and difference(values, "b", against="never run") is None


def test_six_seeds_have_five_degrees_of_freedom():
    values = {BASELINE: dict.fromkeys(range(6), 0.0), "a": {seed: float(seed) for seed in range(6)}}
    assert difference(values, "a").half_width == pytest.approx(2.5706 * math.sqrt(3.5) / math.sqrt(6), rel=1e-4)


def test_the_command_draws_what_the_json_holds(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(made_up({BASELINE: [1.0, 2.0], "a": [1.25, 2.75], "b": [0.5]})))
    assert main([str(path), "--folder", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "ablations.md").read_text()
    same = "25.0 ± 0.0 | " * 4
    assert f"| label of a |  | 2 | {same}2.000 ± 1.061 | 25.0 ± 0.0 |" in text
    assert f"| label of b |  | 1 | {'25.0 | ' * 4}0.500 | 25.0 |" in text
    assert f"| label of a | label of b | 1 | {'+0.0 | ' * 4}+0.750 | +0.0 |" in text and "never run" not in text
    # differences 0.25 and 0.75, one degree of freedom: 12.706 * 0.3536 / 1.4142
    assert f"| label of a | label of baseline | 2 | {'+0.0 ± 0.0 | ' * 4}+0.500 ± 3.177 |" in text
    assert (tmp_path / "out" / "ablations.png").stat().st_size > 10_000


def test_tables_of_a_single_arm_need_no_plot(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(made_up({BASELINE: [1.0]})))
    assert main([str(path)]) == 0 and not (tmp_path / "ablations.png").exists()


def test_the_main_arms_ask_what_the_page_promises():
    assert MAIN_ARMS == (BASELINE, "align-off", "tower-frozen", "align-softmax", "align-contrastive", "align-paper")
    assert ablations.PAIRS[0] == (BASELINE, "align-off"), "the test that was fixed beforehand"


def test_stopping_stops_the_other_jobs_too(tmp_path, monkeypatch):
    def stop(*arguments):
        raise ablations.StopRequested

    sleep, begin = [sys.executable, "-c", "import time; time.sleep(600)"], subprocess.Popen
    begun = []
    monkeypatch.setattr(subprocess, "Popen", lambda command: begun.append(begin(sleep)) or begun[-1])
    monkeypatch.setattr(ablations, "run_all", stop)
    assert ablations.main([str(tmp_path), "--jobs", "2"]) == 1
    assert [helper.wait(timeout=60) for helper in begun] == [-signal.SIGTERM]


# --- the page -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return json.loads((DOCS / "assets" / "ablations.json").read_text())


def test_stored_results_belong_to_these_variants_and_this_schedule(stored, tmp_path):
    now = json.loads(json.dumps(collect(tmp_path)))
    assert {**stored, "runs": []} == now


def test_the_page_shows_the_tables_of_the_stored_results(stored):
    assert markdown(stored) in (DOCS / "ablations.md").read_text()
