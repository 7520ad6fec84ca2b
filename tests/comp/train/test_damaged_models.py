"""Damaged model folders: every kind is a ValueError with path and cause, and train.py ends with 2 and one message."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import export_toy_model, toy_config

import train
from comp import CoMP, VisionEncoder
from comp.answer import load
from comp.config import ConfigError
from comp.model.causal_lm import load_language_model

pytestmark = pytest.mark.slow

LOADERS = dict(vision=VisionEncoder.from_pretrained, language=lambda path: load_language_model(path, "float32"))
WEIGHTS = "model.safetensors"


def weights(folder):
    return folder / WEIGHTS


def pointer(folder):
    weights(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def pointer_of_config(folder):
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def cut_tensors(folder):
    weights(folder).write_bytes(weights(folder).read_bytes()[:-100])


def cut_header(folder):
    weights(folder).write_bytes(weights(folder).read_bytes()[:40])


def empty(folder):
    weights(folder).write_bytes(b"")


def pickled(folder):
    torch.save(load_file(weights(folder)), weights(folder).with_suffix(".new"))
    weights(folder).with_suffix(".new").rename(weights(folder))


def as_bin(folder):
    path = folder / "pytorch_model.bin"
    torch.save(load_file(weights(folder)), path)
    weights(folder).unlink()
    return path


def pointer_bin(folder):
    as_bin(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def cut_bin(folder):
    path = as_bin(folder)
    path.write_bytes(path.read_bytes()[:-500])


def not_a_bin(folder):
    torch.save([torch.zeros(2)], as_bin(folder))


def nested_bin(folder):
    path = as_bin(folder)
    torch.save({"state_dict": torch.load(path)}, path)


def cut_index(folder):
    weights(folder).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": ')


def index_of_numbers(folder):
    weights(folder).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": 3}}')


def of_type(dtype):
    def change(folder):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(weights(folder)).items()}, weights(folder))

    return change


def without_some(folder):
    tensors = load_file(weights(folder))
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1." not in name}, weights(folder))


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def config_text(text):
    return lambda folder: (folder / "config.json").write_text(text)


BOTH = {
    "pointer": (pointer, r"model\.safetensors is a pointer of git-lfs \(\d+ bytes\)"),
    "pointer of config": (pointer_of_config, r"config\.json is a pointer of git-lfs"),
    "cut": (cut_tensors, r"model\.safetensors cannot be read, it is damaged or cut off \(\d+ bytes\)"),
    "cut in the header": (cut_header, r"model\.safetensors is cut off in its header \(40 bytes\)"),
    "empty": (empty, r"model\.safetensors is empty"),
    "pickled": (pickled, r"model\.safetensors is no safetensors file \(\d+ bytes\)"),
    "pointer, .bin": (pointer_bin, r"pytorch_model\.bin is a pointer of git-lfs"),
    "cut, .bin": (cut_bin, r"pytorch_model\.bin cannot be read, it is damaged or cut off"),
    "a list, .bin": (not_a_bin, r"pytorch_model\.bin must hold tensors by name, got list"),
    "nested, .bin": (nested_bin, r"pytorch_model\.bin must hold tensors by name, got \{'state_dict': "),
    "cut index": (cut_index, r"index\.json cannot be read, it is damaged or cut off"),
    "index of numbers": (index_of_numbers, r"index\.json must have a weight_map from tensors to files"),
    "int8": (of_type(torch.int8), r"must be of floating-point numbers, got (torch\.int8|I8)"),
    "complex": (of_type(torch.complex64), r"must be of floating-point numbers, got (torch\.complex64|C64)"),
    "tensors missing": (without_some, r"[Mm]issing|lack"),
    "config is a list": (config_text("[1]"), r"config\.json must hold a JSON object, got \[1\]"),
    "config is null": (config_text("null"), r"config\.json must hold a JSON object, got null"),
    "config is cut": (config_text('{"model_type": '), r"config\.json cannot be read, it is damaged or cut off"),
    "size as text": (config(hidden_size="32"), r"hidden_size|config\.json"),
    "no heads": (config(num_attention_heads=0), r"."),
    "a list of sizes": (config(hidden_size=[32]), r"."),
    "negative layers": (config(num_hidden_layers=-1), r"."),
    "unknown model": (config(model_type="nothing"), r"nothing"),
}
VISION = {
    "unknown choice": (config(comp=dict(colour=1)), r'config\.json: "comp" must hold fields of .*; got unknown \[\'colour\'\]'),
    "choices are a list": (config(comp=[1]), r'config\.json: "comp" must hold fields of .*; got \[1\]'),
    "a choice of the wrong type": (config(comp=dict(merge_size="2")), r"merge_size must be an integer of at least 1, got '2'"),
    "no heads": (config(num_attention_heads=0), r"config\.json: num_heads must be an integer of at least 1, got 0"),
    "size as text": (config(hidden_size="32"), r"config\.json: width must be an integer of at least 1, got '32'"),
    "patch as text": (config(patch_size="4"), r"config\.json"),
    "a tower that is a number": (config(vision_config=3), r"config\.json"),
}
CASES = [("vision", *case) for case in VISION.values()] + [(part, *case) for part in LOADERS for case in BOTH.values()]
NAMES = [f"vision: {name}" for name in VISION] + [f"{part}: {name}" for part in LOADERS for name in BOTH]


@pytest.fixture
def copied_folder(toy_folder):
    """Folders that may be damaged."""
    for part in LOADERS:
        target = (toy_folder / part).resolve()
        (toy_folder / part).unlink()
        shutil.copytree(target, toy_folder / part)
    return toy_folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("part", "change", "message"), CASES, ids=NAMES)
def test_a_damaged_folder_is_named_with_its_cause(part, change, message, copied_folder, monkeypatch, capsys):
    folder = copied_folder / part
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        LOADERS[part](folder)
    assert str(folder) in str(caught.value)
    monkeypatch.setitem(train.RECIPES, "toy", lambda: toy_config(copied_folder))
    assert train.main(["--recipe", "toy"]) == 2
    said = capsys.readouterr().err
    assert f"train.py: {folder} cannot be loaded: " in said and "Traceback" not in said


def test_a_damaged_tokenizer_is_named(copied_folder, monkeypatch, capsys):
    monkeypatch.setitem(train.RECIPES, "toy", lambda: toy_config(copied_folder))
    for text in ("[1]", "null", '{"model": ', '{"model": {"type": "BPE", "vocab": 3}}'):
        (copied_folder / "language" / "tokenizer.json").write_text(text)
        assert train.main(["--recipe", "toy"]) == 2
        assert f"train.py: {copied_folder / 'language'} cannot be loaded: " in capsys.readouterr().err


@pytest.mark.parametrize("part", LOADERS)
def test_weights_that_are_not_finite_are_said(part, copied_folder):
    path = copied_folder / part / WEIGHTS
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(("layer_norm1.weight", "input_layernorm.weight")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOADERS[part](path.parent)
    tensors[name][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"{path.parent}: not all numbers are finite in .*norm"):
        LOADERS[part](path.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"config\.json must hold a JSON object, got \[1\]"),
        ("{", r"config\.json cannot be read, it is damaged or cut off"),
        (
            '{"image_token_id": "3", "position_ids": "mrope"}',
            r"config\.json must hold image_token_id \(a number\) and position_ids",
        ),
        ('{"image_token_id": 3}', r"config\.json must hold image_token_id \(a number\) and position_ids"),
        ('{"image_token_id": 3, "position_ids": "2d"}', r"position_ids must be one of"),
    ],
)
def test_a_damaged_export_is_named(text, message, copied_folder):
    export = export_toy_model(copied_folder)
    (export / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        CoMP.from_pretrained(export)
    with pytest.raises(ConfigError, match=f"{export} cannot be loaded: "):
        load(export)
