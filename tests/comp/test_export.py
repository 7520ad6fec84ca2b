"""What a run leaves, used by transformers alone: every model is loaded and run in a process that cannot import this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from towers import TOWERS, make_tower
from toy import export_toy_model

from comp import VisionEncoder
from comp.answer import answer
from comp.eval.exported import load
from comp.model import Adapter

ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("comp", "comp_kernels"):
            raise ModuleNotFoundError(f"{name} is not to be imported")

sys.meta_path.insert(0, Absent())
"""


def run_alone(code: str, folder: Path) -> dict[str, torch.Tensor]:
    """Run code in a process without this project, in `folder`; what it saves as out.safetensors."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1")
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error::FutureWarning", "-c", ALONE + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "newly initialized" not in result.stderr and "MISSING" not in result.stderr, result.stderr
    return load_file(folder / "out.safetensors")


def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(40, 24), (21, 47), (16, 16)]
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())
        for width, height in sizes
    ]


TOWER = """
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

torch.set_grad_enabled(False)
out = {}
images = [Image.open(f"{i}.png") for i in range(3)]
for name in NAMES:
    inputs = AutoImageProcessor.from_pretrained(name, backend="pil")(images, return_tensors="pt")
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    features = model(**inputs).last_hidden_state
    for i, image in enumerate(model.feature_maps(features, inputs["image_grid_thw"])):
        out[f"{name}/{i}"] = image[0].contiguous()
    out[f"{name}/tokens"] = model.adapter(features)
save_file(out, "out.safetensors")
"""


@pytest.mark.slow
def test_a_tower_of_any_family_and_its_adapter(tmp_path):
    """At native sizes, with every kind of positions; to 1e-5 of the largest feature, where bicubic tables of transformers'
    image processor are rounded as ours."""
    encoders = {}
    for number, name in enumerate(TOWERS):
        make_tower(name).save_pretrained(tmp_path / "from" / name)
        encoder = VisionEncoder.from_pretrained(
            tmp_path / "from" / name,
            pos_mode=("abs+rope", "rope", "abs")[number % 3],
            keep_prefix_tokens=number % 2 == 0,
            abs_pos_order="raster_legacy" if name == "dinov2" else "merge",
            rope_dtype="bf16_legacy" if name == "clip" else "fp32",
            final_norm=True,
        )
        encoder.adapter = Adapter(48, 20)
        encoder.save_pretrained(tmp_path / name)
        encoders[name] = encoder
    for i, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{i}.png")
    found = run_alone(TOWER.replace("NAMES", repr(list(TOWERS))), tmp_path)
    for name, encoder in encoders.items():
        for i, features in enumerate(encoder.encode(pictures())):
            assert_close(found[f"{name}/{i}"], features, name)
        with torch.no_grad():
            prepared = [encoder.prepare(picture) for picture in pictures()]
            tokens = encoder.adapter(encoder(torch.cat([p for p, _ in prepared]), torch.tensor([g for _, g in prepared])))
        assert_close(found[f"{name}/tokens"], tokens, name)


def assert_close(found, expected, name):
    assert found.shape == expected.shape, name
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"{name}: {error:.1e}"


WHOLE = """
import json
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

processor = AutoProcessor.from_pretrained("export", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("export", trust_remote_code=True)
images = [Image.open(f"{i}.png") for i in range(3)]


def turn(images, text):
    return [dict(role="user", content=[*(dict(type="image", image=image) for image in images), dict(type="text", text=text)])]


def ask(conversations, **options):
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=8, **options)
    return [text.strip() for text in processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


questions = [turn(images[:1], "What colour is it?"), turn(images, "Is it wide or tall?"), turn([], "What colour is it?")]
answers = dict(
    alone=[ask([question])[0] for question in questions],
    together=ask(questions),
    beams=ask(questions[:2], num_beams=3),
    ends=model.generation_config.eos_token_id,
)
torch.manual_seed(0)
sampled = {ask(questions[:1], do_sample=True, temperature=5.0)[0] for _ in range(5)}
assert len(sampled) > 1, sampled
json.dump(answers, open("answers.json", "w"))

inputs = processor.apply_chat_template(questions[:2], tokenize=True, return_dict=True, return_tensors="pt", padding=True)
loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
loss.backward()
assert model.vision.patch_embed.weight.grad.abs().max() > 0
again = type(model).from_pretrained("export", dtype=torch.bfloat16)
assert again.vision.blocks[0].attn.qkv.weight.dtype == again.language_model.dtype == torch.bfloat16
model.save_pretrained("again")
save_file({"loss": loss.detach()}, "out.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("position_ids", ["mrope", "1d"])
def test_the_whole_model_answers_as_ours(position_ids, toy_folder, tmp_path):
    """One image, several, none; rows alone, padded in one batch, several beams; the answers end where ours do."""
    export_toy_model(toy_folder, position_ids=position_ids)
    for i, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{i}.png")
    run_alone(WHOLE, tmp_path)
    answers = json.loads((tmp_path / "answers.json").read_text())
    model, template = load(tmp_path / "export")
    asked = [(pictures()[:1], "What colour is it?"), (pictures(), "Is it wide or tall?"), ([], "What colour is it?")]
    ours = [answer(model, template, *question, max_new_tokens=8) for question in asked]
    assert answers["alone"] == answers["together"] == ours and len(set(ours)) == 3
    assert answers["ends"] == template.end_ids
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    assert settings["image_token_id"] == template.image_id and settings["position_ids"] == position_ids
