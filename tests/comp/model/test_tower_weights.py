"""Reading and writing checkpoints: strict both ways, the layouts of transformers and of the released CoMP code."""

import fnmatch
import json
import re
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from towers import TOWERS, make_tower
from transformers import SiglipVisionConfig, SiglipVisionModel

from comp import VisionEncoder
from comp.model import Adapter, weights

GRID_4x6 = torch.tensor([[1, 4, 6]])


def features(encoder, patches):
    with torch.no_grad():
        return encoder(patches, GRID_4x6)


def rewrite(source, target, change):
    """Copy a checkpoint directory with its tensors and configuration changed by change(tensors, config)."""
    target.mkdir()
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    tensors, config = change(tensors, config)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("keep", [False, True])
def test_save_and_load_give_the_same_encoder(name, keep, tower_directory, tmp_path):
    choices = dict(pos_mode="abs+rope", abs_pos_interp="bilinear", keep_prefix_tokens=keep, merge_size=2)
    encoder = VisionEncoder.from_pretrained(tower_directory(name), **choices)
    encoder.adapter = Adapter(48, 20)
    encoder.save_pretrained(tmp_path / "saved")
    loaded = VisionEncoder.from_pretrained(tmp_path / "saved")
    for field in ("pos_mode", "abs_pos_order", "abs_pos_interp", "keep_prefix_tokens", "image_mean", "antialias"):
        assert getattr(loaded.config, field) == getattr(encoder.config, field), field
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert loaded.adapter is not None


@pytest.mark.parametrize("name", TOWERS)
def test_saved_as_transformers_it_is_the_same_tower(name, tower_directory, tmp_path):
    """Loaded by the library's own class: nothing missing, nothing unexpected, and the outputs are those it had."""
    encoder = VisionEncoder.from_pretrained(tower_directory(name), keep_prefix_tokens=True, final_norm=True)
    encoder.adapter = Adapter(48, 20)
    encoder.save_as_transformers(tmp_path)
    original = make_tower(name)
    loaded, report = type(original).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = dict(pixel_values=torch.randn(1, 3, 24, 24))
    if name == "siglip2":
        mask, shape = torch.ones(1, 36, dtype=torch.long), torch.tensor([[6, 6]])
        inputs = dict(pixel_values=torch.randn(1, 36, 48), pixel_attention_mask=mask, spatial_shapes=shape)
    with torch.no_grad():
        found, expected = loaded.eval()(**inputs), original(**inputs)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    if name in ("clip", "dinov2"):  # the pooled output has no weights of its own
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)


def test_what_transformers_cannot_compute_is_refused(tower_directory, tmp_path):
    for name, choices, message in (
        (
            "siglip",
            dict(pos_mode="abs+rope", final_norm=True),
            r"siglip class for this tower: pos_mode='abs\+rope' \(needs 'abs'\)",
        ),
        ("siglip", dict(), "final_norm=False"),
        ("dinov2", dict(), "keep_prefix_tokens=False"),
        ("aimv2", dict(abs_pos_order="raster_legacy"), "abs_pos_order='raster_legacy'"),
    ):
        encoder = VisionEncoder.from_pretrained(tower_directory(name), **choices)
        with pytest.raises(ValueError, match=message):
            encoder.save_as_transformers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_towers_that_were_saved_in_their_familys_names(tower_directory, tmp_path):
    """What save_pretrained wrote before: names of the family, the choices under "comp", the adapter as merger.*"""
    encoder = VisionEncoder.from_pretrained(tower_directory("dinov2"), pos_mode="abs+rope", merge_size=1)
    encoder.adapter = Adapter(48, 20, merge_size=1)
    stored = {name: getattr(encoder.config, name) for name in weights.STORED}
    (tmp_path / "config.json").write_text(json.dumps({**encoder.config.hugging_face, "comp": stored}))
    save_file(weights.to_theirs(encoder.config, encoder.state_dict()), tmp_path / "model.safetensors")
    loaded, patches = VisionEncoder.from_pretrained(tmp_path), torch.randn(24, 48)
    assert loaded.pos_mode == "abs+rope" and loaded.config.merge_size == 1
    assert torch.equal(features(loaded, patches), features(encoder, patches))
    assert torch.equal(loaded.adapter.fc2.weight, encoder.adapter.fc2.weight)


def test_dtype_and_memory_of_their_own(tower_directory):
    encoder = VisionEncoder.from_pretrained(tower_directory("siglip"), dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    again = VisionEncoder.from_pretrained(tower_directory("siglip"))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert VisionEncoder.from_pretrained(tower_directory("siglip")).pos_embed.abs().max() > 0
    assert not again.training and all(p.requires_grad for p in again.parameters())


def test_pixel_statistics(tower_directory, tmp_path):
    """By family, unless the directory says otherwise."""
    path = rewrite(tower_directory("dinov2"), tmp_path / "copy", lambda tensors, config: (tensors, config))
    assert VisionEncoder.from_pretrained(path).config.image_mean == (0.485, 0.456, 0.406)
    settings = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 224})
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    config = VisionEncoder.from_pretrained(path).config
    assert (config.image_mean, config.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_missing_and_unexpected_weights_are_listed(tower_directory, tmp_path):
    def change(tensors, config):
        tensors["encoder.layers.0.mlp.fc9.weight"] = tensors.pop("encoder.layers.0.mlp.fc1.weight")
        return tensors, config

    path = rewrite(tower_directory("siglip"), tmp_path / "renamed", change)
    with pytest.raises(ValueError) as error:
        VisionEncoder.from_pretrained(path)
    assert "Missing: ['encoder.layers.0.mlp.fc1.weight']" in str(error.value)
    assert "Unexpected: ['encoder.layers.0.mlp.fc9.weight']" in str(error.value)


def test_a_layer_too_many_or_too_few_is_an_error(tower_directory, tmp_path):
    for layers in (1, 3):
        path = rewrite(
            tower_directory("dinov2"), tmp_path / str(layers), lambda t, c, n=layers: (t, {**c, "num_hidden_layers": n})
        )
        with pytest.raises(ValueError, match=r"(Missing|Unexpected): \['encoder\.layer\."):
            VisionEncoder.from_pretrained(path)


def test_shapes_must_fit_the_configuration(tower_directory, tmp_path):
    path = rewrite(tower_directory("siglip"), tmp_path / "wide", lambda t, c: (t, {**c, "intermediate_size": 96}))
    with pytest.raises(
        ValueError, match=r"blocks.0.mlp.fc1.weight must be \(96, 48\) by config.json, the file has \[\(80, 48\)\]"
    ):
        VisionEncoder.from_pretrained(path)


def test_prefix_tokens_that_the_file_lacks(tower_directory, tmp_path):
    def change(tensors, config):
        del tensors["embeddings.cls_token"]
        return tensors, config

    path = rewrite(tower_directory("dinov2"), tmp_path / "no_cls", change)
    VisionEncoder.from_pretrained(path)
    with pytest.raises(ValueError, match=r"Missing: \['embeddings.cls_token'\]"):
        VisionEncoder.from_pretrained(path, keep_prefix_tokens=True)


def test_towers_inside_larger_models(tmp_path, tower_directory):
    """A two-tower model, a classifier, a pickled and a sharded checkpoint hold the same tower."""
    tower = make_tower("siglip")
    text = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48, vocab_size=50, bos_token_id=0)
    text.update(eos_token_id=1, pad_token_id=2)
    config = transformers.SiglipConfig(vision_config=tower.config.to_dict(), text_config=text)
    both = transformers.SiglipModel(config)
    both.vision_model.load_state_dict(tower.state_dict())
    both.save_pretrained(tmp_path / "both")

    dino = make_tower("dinov2")
    classifier = transformers.Dinov2ForImageClassification(dino.config)
    classifier.dinov2.load_state_dict(dino.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")

    source = tower_directory("siglip")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((source / "config.json").read_text())
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    tower.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1

    patches = torch.randn(24, 48)
    for name, reference in (("both", "siglip"), ("classifier", "dinov2"), ("pickled", "siglip"), ("sharded", "siglip")):
        expected = features(VisionEncoder.from_pretrained(tower_directory(reference)), patches)
        assert torch.equal(features(VisionEncoder.from_pretrained(tmp_path / name), patches), expected), name


def test_aimv2_in_its_original_layout(tower_directory, tmp_path):
    def change(tensors, config):
        renamed = {}
        for i in range(2):
            qkv = [tensors.pop(f"encoder.layers.{i}.attention.{x}_proj.weight") for x in "qkv"]
            renamed[f"trunk.blocks.{i}.attn.qkv.weight"] = torch.cat(qkv)
        rules = [
            (r"embeddings\.patch_embed", "preprocessor.patchifier.proj"),
            (r"embeddings\.rms_norm", "preprocessor.patchifier.norm"),
            (r"embeddings\.position_embedding\.weight", "preprocessor.pos_embed"),
            (r"encoder\.layers\.(\d+)\.attention\.out_proj", r"trunk.blocks.\1.attn.proj"),
            (r"encoder\.layers\.(\d+)\.ffn\.gate_proj", r"trunk.blocks.\1.mlp.fc1"),
            (r"encoder\.layers\.(\d+)\.ffn\.down_proj", r"trunk.blocks.\1.mlp.fc2"),
            (r"encoder\.layers\.(\d+)\.ffn\.up_proj", r"trunk.blocks.\1.mlp.fc3"),
            (r"encoder\.layers\.(\d+)\.rms_norm(\d)", r"trunk.blocks.\1.norm_\2"),
            (r"^rms_norm", "trunk.post_trunk_norm"),
        ]
        for name, tensor in tensors.items():
            if name.startswith("head."):
                continue
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor.unsqueeze(0) if name == "preprocessor.pos_embed" else tensor
        return renamed, {**config, "model_type": "aimv2", "use_bias": False}

    path = rewrite(tower_directory("aimv2"), tmp_path / "original", change)
    patches = torch.randn(24, 48)
    original = VisionEncoder.from_pretrained(path)
    assert torch.equal(features(original, patches), features(VisionEncoder.from_pretrained(tower_directory("aimv2")), patches))
    original.save_as_transformers(tmp_path / "saved")
    loaded = transformers.Aimv2VisionModel.from_pretrained(tmp_path / "saved")
    image = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        expected = make_tower("aimv2")(image).last_hidden_state
        torch.testing.assert_close(loaded(image).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def released(tensors, config, *, adapter: bool, **settings):
    """What the released CoMP code saves: no heads, no CLS, SigLIP's tower under vision_model., the adapter as merger.*"""
    prefix = "vision_model." if config["model_type"].startswith("siglip") else ""
    dropped = ("head.", "post_layernorm.", "embeddings.cls_token", "embeddings.mask_token")
    tensors = {prefix + name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    if adapter:
        shapes = dict(zip(("ln_q", "mlp.0", "mlp.2"), ((48,), (192, 192), (64, 192))))
        for name, shape in shapes.items():
            tensors[f"merger.{name}.weight"], tensors[f"merger.{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    return tensors, {**config, "spatial_merge_size": 2, **settings}


@pytest.mark.parametrize("name", ["siglip", "dinov2"])
@pytest.mark.parametrize("adapter", [False, True])
def test_released_comp_layout(name, adapter, tower_directory, tmp_path):
    change = lambda tensors, config: released(tensors, config, adapter=adapter, use_rope=True)  # noqa: E731
    path = rewrite(tower_directory(name), tmp_path / "released", change)
    with pytest.warns(UserWarning, match="raster_legacy"):
        encoder = VisionEncoder.from_pretrained(path)
    assert (encoder.pos_mode, encoder.config.abs_pos_order) == ("abs+rope", "raster_legacy")
    assert (encoder.adapter is not None) == adapter
    if adapter:
        assert torch.equal(encoder.adapter.fc2.weight, load_file(path / "model.safetensors")["merger.mlp.2.weight"])
        assert encoder.adapter(torch.randn(24, 48)).shape == (6, 64)

    plain = VisionEncoder.from_pretrained(tower_directory(name), pos_mode="abs+rope", abs_pos_order="raster_legacy")
    patches = torch.randn(24, 48)
    assert torch.equal(features(encoder, patches), features(plain, patches))

    encoder.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = VisionEncoder.from_pretrained(tmp_path / "saved")
        chosen = VisionEncoder.from_pretrained(path, abs_pos_order="merge")
    assert stored.config.abs_pos_order == "raster_legacy" and torch.equal(features(stored, patches), features(encoder, patches))
    assert chosen.config.abs_pos_order == "merge"


@pytest.mark.parametrize("name", ["siglip", "dinov2"])
def test_the_tower_of_a_whole_comp_mm(name, tower_directory, tmp_path):
    """Tower and adapter under visual., beside a language model that is left out."""

    def change(tensors, config):
        tensors, vision = released(tensors, config, adapter=True, use_rope=True)
        tensors = {f"visual.{name}": tensor for name, tensor in tensors.items()}
        language = {"model.embed_tokens.weight": torch.zeros(5, 64), "lm_head.weight": torch.zeros(5, 64)}
        return {**tensors, **language}, {"model_type": "comp_mm", "vision_config": vision}

    path = rewrite(tower_directory(name), tmp_path / "whole", change)
    with pytest.warns(UserWarning, match="raster_legacy"):
        encoder = VisionEncoder.from_pretrained(path)
    assert (encoder.pos_mode, encoder.config.abs_pos_order) == ("abs+rope", "raster_legacy")
    assert torch.equal(encoder.adapter.fc2.weight, load_file(path / "model.safetensors")["visual.merger.mlp.2.weight"])
    plain = VisionEncoder.from_pretrained(tower_directory(name), pos_mode="abs+rope", abs_pos_order="raster_legacy")
    patches = torch.randn(24, 48)
    assert torch.equal(features(encoder, patches), features(plain, patches))


def test_released_layout_without_rope(tower_directory, tmp_path):
    change = lambda tensors, config: released(tensors, config, adapter=True, use_rope=False)  # noqa: E731
    path = rewrite(tower_directory("siglip"), tmp_path / "released", change)
    with pytest.warns(UserWarning, match="raster_legacy"):
        assert VisionEncoder.from_pretrained(path).pos_mode == "abs"


@pytest.mark.parametrize("kinds", [("safetensors",), ("bin",), ("safetensors", "bin")])
def test_of_a_hub_repository_one_kind_of_weights_is_fetched(kinds, tower_directory, tmp_path, monkeypatch):
    source, cache = tower_directory("siglip"), tmp_path / "cache"
    cache.mkdir()
    held = {"config.json": source / "config.json"}
    if "bin" in kinds:
        torch.save(load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
        held["pytorch_model.bin"] = tmp_path / "pytorch_model.bin"
    if "safetensors" in kinds:
        held["model.safetensors"] = source / "model.safetensors"

    def snapshot_download(hub_id, allow_patterns):
        assert hub_id == "somebody/siglip"
        for name, path in held.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    encoder = VisionEncoder.from_pretrained("somebody/siglip")
    assert torch.equal(encoder.pos_embed, VisionEncoder.from_pretrained(source).pos_embed)
    fetched = "pytorch_model.bin" if kinds == ("bin",) else "model.safetensors"
    assert {path.name for path in cache.iterdir()} == {"config.json", fetched}


def test_a_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="must hold a config"):
        VisionEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must hold model.safetensors or pytorch_model.bin"):
        VisionEncoder.from_pretrained(tmp_path)


class TestWhichFilesAreTheWeights:
    """model.safetensors, else what its index names, else pytorch_model.bin and its index: as transformers reads a folder."""

    def folder(self, tmp_path):
        config = SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
        )
        SiglipVisionModel(config).save_pretrained(tmp_path)
        return tmp_path, load_file(tmp_path / "model.safetensors")

    def bias(self, folder):
        return VisionEncoder.from_pretrained(folder).patch_embed.bias

    def test_other_weight_files_beside_them_are_not_read(self, tmp_path):
        folder, weights = self.folder(tmp_path)
        expected = self.bias(folder).clone()
        for name in ("model_ema.safetensors", "open_clip_model.safetensors", "a.safetensors"):
            save_file({key: value + 1 for key, value in weights.items()}, folder / name)
        torch.save({key: value + 1 for key, value in weights.items()}, folder / "pytorch_model.bin")
        torch.testing.assert_close(self.bias(folder), expected, rtol=0, atol=0)

    def test_parts_are_those_of_the_index(self, tmp_path):
        folder, weights = self.folder(tmp_path)
        expected = self.bias(folder).clone()
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
        for part, held in parts.items():
            save_file({name: weights[name] for name in held}, folder / part)
        save_file({name: weights[name] + 1 for name in names}, folder / "old.safetensors")
        index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        torch.testing.assert_close(self.bias(folder), expected, rtol=0, atol=0)
        save_file({name: weights[name] for name in names}, folder / "part-2.safetensors")
        with pytest.raises(ValueError, match="another file of the same checkpoint"):
            self.bias(folder)
        (folder / "part-2.safetensors").unlink()
        with pytest.raises(ValueError, match=r"names \['part-2.safetensors'\]"):
            self.bias(folder)
