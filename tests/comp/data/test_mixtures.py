"""The paper's mixtures: what a recipe says where their files are missing, and that it reads them where they lie."""

import json

import pytest
import yaml

import train
from comp.config import ConfigError, SourceConfig
from comp.data.mixture import check_files, open_sources
from comp.recipes import MIXTURES, RECIPES

STAGES = {"stage1": 1, "stage2": 7, "stage3": 2, "llava_sft": 1}


def entries(name):
    return yaml.safe_load((MIXTURES / f"{name}.yaml").read_text())["datasets"]


def test_every_set_says_what_it_is():
    assert {path.stem for path in MIXTURES.iterdir()} == set(STAGES)
    for name, number in STAGES.items():
        assert len(entries(name)) == number
        for entry in entries(name):
            assert entry["source"].startswith("https://huggingface.co/datasets/") and entry["licence"] and entry["samples"], (
                entry
            )


@pytest.mark.parametrize("recipe", ["siglip-so400m_qwen2.5-0.5b", "comp-siglip-so400m_qwen2.5-7b", "table2_aimv2-large"])
def test_a_recipe_names_all_that_is_missing(recipe, tmp_path, monkeypatch, capsys):
    """Once each, of all stages, before a model is looked for; what is there is not named."""
    monkeypatch.chdir(tmp_path)
    used = {source.path for stage in RECIPES[recipe]().stages for source in stage.data}
    needed = [entry for path in used for entry in yaml.safe_load(open(path))["datasets"]]
    there = tmp_path / "data" / needed[0]["json_path"]
    if len(needed) > 1:
        there.parent.mkdir(parents=True)
        there.write_text("[]")
    assert train.main(["--recipe", recipe, f"output_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    missing = needed[len(needed) > 1 :]
    assert f"{len(missing)} files of the mixtures are missing" in said
    for entry in missing:
        assert said.count(f"data/{entry['json_path']}\n") == 1 and entry["licence"] in said
        assert f"samples {entry['samples']}" in said and entry["source"].split()[0] in said
    assert len(needed) == 1 or f"data/{needed[0]['json_path']}\n" not in said


def test_files_lie_in_the_folder_that_the_mixture_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "this"}]
    for entry in entries("stage3"):
        path = tmp_path / "data" / entry["json_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    sources = [SourceConfig(path=str(MIXTURES / "stage3.yaml"))]
    check_files(sources)
    dataset = open_sources(sources, seed=0)
    assert len(dataset) == 2 and dataset[1].messages[1].text == "this"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root: 3\ndatasets: []", "root must be the name of a folder, got 3"),
        ("datasets: [{json_path: a.json, images: 3}]", r"datasets\[0\]: images must be the name of a folder, got 3"),
        ("datasets: [{json_path: 3}]", r"datasets\[0\]: needs json_path"),
        ("datasets: [{json_path: a.json, license: x}]", r"datasets\[0\]: needs json_path, may have .*licence; got .*license"),
    ],
)
def test_mistakes_are_named(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_files([SourceConfig(path=str(tmp_path / "mine.yaml"))])


def test_a_mixture_is_utf8_or_refused(tmp_path):
    text = "datasets: [{json_path: Bücher.json}]"
    (tmp_path / "mine.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine\.yaml is not valid YAML"):
        check_files([SourceConfig(path=str(tmp_path / "mine.yaml"))])
    (tmp_path / "mine.yaml").write_bytes(text.encode())
    with pytest.raises(ConfigError, match="Bücher"):
        check_files([SourceConfig(path=str(tmp_path / "mine.yaml"))])
