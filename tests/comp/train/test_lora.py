"""LoRA through peft: what trains, exact resume, and what is exported, merged and as an adapter."""

import json
import sys
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from toy import toy_config
from transformers import AutoModel, AutoModelForCausalLM

import comp.train.trainer
from comp import VisionEncoder
from comp.build import build_model
from comp.config import ConfigError
from comp.config_io import apply_overrides
from comp.log import read_records
from comp.runs import trained_config
from comp.train.optim import part_reports, set_trainable, train_mode
from comp.train.trainer import Trainer

peft = pytest.importorskip("peft", reason="pip install 'comp-kernels[lora]'")

RANK = 3
LORA = [f"vision.lora={{rank: {RANK}, dropout: 0.1}}", f"language.lora={{rank: {RANK}, targets: [q_proj, down_proj]}}"]


def run(folder, *overrides, resume=False):
    settings = [*LORA, "eval.data=[]", "stages.*.max_steps=2", "checkpoint.every_steps=1", *overrides]
    with patch("comp.train.trainer.plot_run"):
        return Trainer(apply_overrides(toy_config(folder), settings), resume=resume).run()


@pytest.fixture(scope="module")
def finished(toy_models):
    """A run with LoRA in both parts; its last export."""
    run(toy_models, "name=lora")
    return toy_models / "runs" / "lora"


def exported(folder, part):
    return load_file(folder / "models" / "III" / part / "model.safetensors")


def test_the_updates_alone_train(toy_folder):
    model, _ = build_model(apply_overrides(toy_config(toy_folder), LORA))
    set_trainable(model, ("vision", "language"))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
    reports = {report.part: report for report in part_reports(model, toy_config(toy_folder).stages[1].optim)}
    language = 2 * RANK * ((32 + 32) + (64 + 32))  # two layers: q_proj 32 x 32, down_proj 32 x 64
    assert reports["language"].num_trainable == language and reports["adapter"].num_trainable == 0
    blocks = 2 * RANK * ((32 + 96) + (32 + 32) + 2 * (32 + 64))
    assert reports["vision"].num_trainable == blocks


def test_names_of_matrices_are_those_of_the_tower_alone(toy_folder):
    """The 2x2 adapter has an fc1 and an fc2 too, new ones, which no update of low rank can replace."""
    model, _ = build_model(apply_overrides(toy_config(toy_folder), [f"vision.lora={{rank: {RANK}, targets: [fc1, fc2]}}"]))
    set_trainable(model, ("adapter",))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("encoder.adapter."), name
    assert sum(".lora_" in name for name, _ in model.named_parameters()) == 2 * 2 * 2
    only_there = apply_overrides(toy_config(toy_folder), ["vision.lora={targets: [norm]}"])
    with pytest.raises(ConfigError, match=r"vision\.lora\.targets"):
        build_model(only_there)


def test_updates_drop_where_they_train(toy_folder):
    model, _ = build_model(apply_overrides(toy_config(toy_folder), LORA))
    for trainable in (("adapter",), ("vision", "language"), ("vision",)):
        train_mode(model, trainable)
        for part, module in (("vision", model.encoder.blocks), ("language", model.language_model)):
            assert {layer.training for layer in module.modules()} == {part in trainable}, (trainable, part)


def test_the_summary_counts_the_updates_alone(finished):
    parts = json.loads((finished / "summary.json").read_text())["stages"][1]["parameters"]
    updates = 2 * RANK * ((32 + 32) + (64 + 32))  # as above
    assert parts["language"]["trainable"] == updates < parts["language"]["all"]
    assert parts["adapter"]["trainable"] == parts["adapter"]["all"]


def test_what_is_merged_gets_no_updates_again(finished):
    config = trained_config(finished, "III")
    assert config.language.lora is None and config.vision.lora is None


def test_a_step_leaves_the_base_as_it_was(finished, toy_models):
    """The merged matrices differ from those before by RANK directions, everything else by nothing."""
    base, _ = build_model(toy_config(toy_models))
    before = {"vision": base.encoder.state_dict(), "language": base.language_model.state_dict()}
    for part, targets in (("vision", (".attn.", ".mlp.")), ("language", ("q_proj.weight", "down_proj.weight"))):
        changed = 0
        for name, tensor in exported(finished, part).items():
            if name.startswith("adapter."):  # the 2x2 adapter trains as ever
                continue
            difference = tensor - before[part][name]
            if tensor.dim() == 2 and any(target in name for target in targets):
                changed += 1
                assert 1 <= torch.linalg.matrix_rank(difference, rtol=1e-3) <= RANK, name
            else:
                assert not difference.any(), name
        assert changed == {"vision": 8, "language": 4}[part]


@pytest.mark.parametrize("at", [3, 6])
def test_a_run_that_breaks_goes_on_bit_for_bit(at, finished, toy_folder):
    """At the first step of a stage and within one; dropout draws the same numbers again."""
    steps, train_step = 0, comp.train.trainer.train_step

    def breaking(*arguments, **options):
        nonlocal steps
        steps += 1
        if steps == at:
            raise KeyboardInterrupt
        return train_step(*arguments, **options)

    with patch("comp.train.trainer.train_step", breaking), pytest.raises(KeyboardInterrupt):
        run(toy_folder, "name=lora")
    run(toy_folder, "name=lora", resume=True)
    for part in ("vision", "language"):
        expected, found = exported(finished, part), exported(toy_folder / "runs" / "lora", part)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected), part
    losses = [
        [record["loss"] for record in read_records(folder / "metrics.jsonl") if record["event"] == "train"]
        for folder in (finished, toy_folder / "runs" / "lora")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_the_adapter_on_the_base_is_the_merged_model(finished, toy_models, tmp_path):
    adapters = finished / "models" / "III" / "lora"
    words = torch.arange(20, 40).unsqueeze(0)
    base = AutoModelForCausalLM.from_pretrained(toy_models / "language").eval()
    merged = AutoModelForCausalLM.from_pretrained(finished / "models" / "III" / "language").eval()
    with torch.no_grad():
        plain = base(words).logits
        found = peft.PeftModel.from_pretrained(base, adapters / "language").eval()(words).logits
        expected = merged(words).logits[..., : plain.shape[-1]]  # rows for new special tokens are in the merged model alone
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-4

    VisionEncoder.from_pretrained(toy_models / "vision", pos_mode="abs+rope").save_pretrained(tmp_path)
    tower = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    patches, grid = torch.randn(24, 48), torch.tensor([[1, 4, 6]])
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(tower, adapters / "vision").eval()(pixel_values=patches, image_grid_thw=grid)
        expected = VisionEncoder.from_pretrained(finished / "models" / "III" / "vision")(patches, grid)
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_words_are_two_matrices_once_one_is_updated(target, toy_folder):
    """The toy ties them. A reader that ties by the configuration would throw one away."""
    model, _ = build_model(apply_overrides(toy_config(toy_folder), [f"language.lora={{rank: 2, targets: [{target}]}}"]))
    language_model = model.language_model.eval()
    for name, parameter in language_model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    saved = toy_folder / "saved"
    model.save_pretrained(saved)
    for config in ("config.json", "language/config.json"):
        settings = json.loads((saved / config).read_text())
        assert settings.get("text_config", settings)["tie_word_embeddings"] is False
    words = torch.arange(20, 40).unsqueeze(0)
    with torch.no_grad():
        expected = language_model(words).logits
        found = AutoModelForCausalLM.from_pretrained(saved / "language").eval()(words).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_recomputed_activations_are_dropped_at_the_same_places(toy_folder):
    model, _ = build_model(apply_overrides(toy_config(toy_folder), ["vision.lora={rank: 4, dropout: 0.5}"]))
    tower = model.encoder.train()
    updates = [p for name, p in tower.named_parameters() if ".lora_" in name]
    for parameter in updates:
        torch.nn.init.normal_(parameter)
    patches, grid = torch.randn(24, 48), torch.tensor([[1, 4, 6]])
    found = []
    for tower.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(tower(patches, grid)[:, 0].square().sum(), updates))
    for plain, recomputed in zip(*found):
        torch.testing.assert_close(recomputed, plain)


def test_mistakes_are_named(toy_folder, monkeypatch):
    config = toy_config(toy_folder)
    for overrides, message in (
        (["language.lora={targets: [query]}"], r"language\.lora\.targets: .*query"),
        (["vision.lora={targets: [q_proj]}"], r"vision\.lora\.targets: .*q_proj"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(apply_overrides(config, overrides))
    with pytest.raises(ConfigError, match=r"lora\.rank must be positive, got 0"):
        apply_overrides(config, ["vision.lora={rank: 0}"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"vision\.lora needs peft: pip install 'comp-kernels\[lora\]'"):
        build_model(apply_overrides(config, ["vision.lora={}"]))
