"""The public checkpoints of the recipes, by structure: every name and shape at full size on the meta device, and a forward at
full width with two layers beside transformers' own class. The tables are helpers/public_checkpoints.py."""

import json

import pytest
import torch
from public_checkpoints import LANGUAGE_FILES, TOWER_FILES, PublicFile, with_layers
from safetensors.torch import save_file
from transformers import (
    Aimv2VisionModel,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)

from comp import CoMP, VisionEncoder
from comp.data.images import patchify
from comp.limits import position_limit
from comp.model import ViTConfig, weights
from comp.model.causal_lm import split
from comp.recipes import RECIPES

by_hub = pytest.mark.parametrize("file", TOWER_FILES, ids=lambda file: file.hub)
CLASSES = {
    "siglip": SiglipVisionModel,
    "siglip2": Siglip2VisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "aimv2": Aimv2VisionModel,
    "clip": CLIPVisionModel,
}


def millions(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@by_hub
def test_a_tower_at_full_size(file, monkeypatch):
    """No name missing, none unexpected, every shape as config.json says; a name too many or a wrong shape is found."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in file.shapes(file.layers).items()}

    def load():
        return VisionEncoder.from_pretrained(file.hub, pos_mode="abs+rope")

    monkeypatch.setattr(weights.Checkpoint, "open", lambda path: weights.Checkpoint(file.config, dict(tensors), {}))
    encoder = load()
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    assert len(encoder.blocks) == file.layers and abs(millions(encoder) - file.million_parameters) < 0.06
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if name.endswith("fc2.weight"))
    tensors[name] = torch.empty(tensor.shape[::-1], device="meta")
    with pytest.raises(ValueError, match=r"mlp\.(fc2|down)\.weight must be"):
        load()
    tensors[name] = tensor
    tensors[name.replace("fc2", "fc4")] = tensor
    with pytest.raises(ValueError, match=r"Missing: none. Unexpected: \[.*fc4"):
        load()


def random_file(file: PublicFile, folder, layers: int = 2):
    """The file's layout with random numbers and fewer layers; of the text side only what belongs to no layer of a size."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in file.shapes(layers).items():
        if name.startswith("text_model.") or ("fc" not in name and "weight" not in name and "bias" not in name and not shape):
            continue
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[-1]).unsqueeze(0)
            continue
        scale = 0.02 if len(shape) > 1 else 0.1
        offset = 1.0 if ("norm" in name and name.endswith("weight")) or "lambda1" in name else 0.0
        tensors[name] = offset + scale * torch.randn(shape)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(with_layers(file.config, layers)))
    return folder


@pytest.mark.slow
@by_hub
def test_a_tower_at_full_width(file, tmp_path):
    """Read from the public layout, the features are those of transformers' class; what that writes today is read as well."""
    folder = random_file(file, tmp_path / "public")
    encoder = VisionEncoder.from_pretrained(folder, keep_prefix_tokens=True, final_norm=True, merge_size=1)
    cls = CLASSES[file.config["model_type"]]
    if cls is Aimv2VisionModel:  # Apple's layout is read by no class of transformers: ours writes it for the library's
        encoder.save_as_transformers(tmp_path / "library")
        folder = tmp_path / "library"
    peer, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    config = encoder.config
    side = config.grid_size
    image = torch.randn(1, 3, side * config.patch_size, side * config.patch_size)
    patches, grid = patchify(image, config.patch_size, 1), torch.tensor([[1, side, side]])
    inputs = dict(pixel_values=image)
    if cls is Siglip2VisionModel:  # rows, columns, channels of a patch
        last = patches.unflatten(1, (3, config.patch_size, config.patch_size)).permute(0, 2, 3, 1).flatten(1).unsqueeze(0)
        mask = torch.ones(1, side * side, dtype=torch.long)
        inputs = dict(pixel_values=last, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[side, side]]))
    with torch.no_grad():
        found, expected = encoder(patches, grid), peer.eval()(**inputs).last_hidden_state[0, -side * side :]
        if cls is CLIPVisionModel:
            expected = peer.get_submodule(next(n for n, _ in peer.named_modules() if n.endswith("post_layernorm")))(expected)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()

    peer.save_pretrained(tmp_path / "today")
    again = VisionEncoder.from_pretrained(tmp_path / "today", keep_prefix_tokens=True, final_norm=True, merge_size=1)
    assert again.config.grid_size == config.grid_size and again.state_dict().keys() == encoder.state_dict().keys()
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("file", LANGUAGE_FILES, ids=lambda file: file.hub)
def test_a_language_model(file, tmp_path):
    """Names and shapes of the whole are those that transformers' class has; at full width with a layer or two and few words the
    public layout is loaded, the rotary base included, and takes part in a CoMP with its own loss."""
    (tmp_path / "config.json").write_text(json.dumps(file.config))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    held = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    if config.tie_word_embeddings:
        assert held.pop("lm_head.weight") == held["model.embed_tokens.weight"]
    assert held == file.shapes(file.layers)
    assert abs(millions(whole) - file.million_parameters) < 0.06
    assert position_limit(whole) == file.config["max_position_embeddings"]

    words, layers = 512, 1 if config.hidden_size > 2000 else 2
    shapes = {
        name: (words, *shape[1:]) if "embed" in name or "lm_head" in name else shape
        for name, shape in file.shapes(layers).items()
    }
    torch.manual_seed(0)
    tensors = {name: 0.02 * torch.randn(shape) + (1.0 if "norm" in name else 0.0) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    (tmp_path / "config.json").write_text(json.dumps({**with_layers(file.config, layers), "vocab_size": words, **ends}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rotary = model.base_model.rotary_emb.inv_freq
    head = file.config.get("head_dim", file.config["hidden_size"] // file.config["num_attention_heads"])
    assert rotary[-1].item() == pytest.approx(file.config["rope_theta"] ** -((head - 2) / head), rel=1e-5)
    name = f"model.layers.{layers - 1}.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[name], tensors[name])
    split(model)  # ValueError unless logits and loss are the model's own
    CoMP(VisionEncoder(tiny_tower()), model, image_token_id=5)  # with M-RoPE


def tiny_tower() -> ViTConfig:
    tower = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=4, image_size=8)
    return ViTConfig.from_hugging_face({"model_type": "siglip_vision_model", **tower})


def test_the_recipes_name_files_that_are_written_down():
    """A recipe that starts from another public file needs its table; SigLIP-L, Llama 3 and released CoMP towers have their
    families' names."""
    known = {file.hub for file in (*TOWER_FILES, *LANGUAGE_FILES)}
    others = {"google/siglip-large-patch16-384", "meta-llama/Meta-Llama-3-8B"}
    for name, recipe in RECIPES.items():
        config = recipe()
        for path in (config.vision.path, config.language.path):
            assert path in known | others or path.startswith("SliMM-X/") or name in ("tiny", "smollm2"), (name, path)
