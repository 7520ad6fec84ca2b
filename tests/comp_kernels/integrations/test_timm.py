"""patch_timm on a small random model of every family: same outputs, same gradients, clear refusals."""

import copy
import io
import pickle

import pytest
import torch
from parity import Tower, check_parity, randomize
from torchvision_stub import import_timm

from comp_kernels.integrations import UnsupportedCall, patch_timm, unpatch

try:
    timm = import_timm()
except ImportError:
    pytest.skip("timm is not installed (pip install --no-deps timm)", allow_module_level=True)
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

SMALL = dict(depth=2, embed_dim=64, num_heads=2, num_classes=6)


def same(output):
    return output


def by_name(name: str, size: int = 64, **kwargs) -> Tower:
    model = timm.create_model(name, img_size=size, **SMALL | kwargs)
    return Tower(model, {"x": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))}, pick=same)


def eva(**kwargs) -> Tower:
    """Options of the class that no small named model uses."""
    model = Eva(img_size=32, patch_size=8, mlp_ratio=2, **SMALL, **kwargs)
    return Tower(model, {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}, pick=same)


def naflex(**kwargs) -> Tower:
    """Three images with grids of different sizes, padded to the largest; the middle one is the smallest."""
    config = NaFlexVitCfg(patch_size=4, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, pos_embed_grid_size=(4, 4), **kwargs)
    model = NaFlexVit(config, num_classes=6)
    grids, longest = [(4, 5), (2, 3), (4, 4)], 20
    coordinates = torch.zeros(len(grids), longest, 2, dtype=torch.long)
    for image, (rows, columns) in enumerate(grids):
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        coordinates[image, : len(grid)] = grid
    valid = torch.arange(longest) < torch.tensor([rows * columns for rows, columns in grids])[:, None]
    patches = torch.randn(len(grids), longest, 48, generator=torch.Generator().manual_seed(3))
    return Tower(model, {"x": patches, "patch_coord": coordinates, "patch_valid": valid}, pick=same)


def gemma4() -> Tower:
    """NaFlex's three images, fewer key heads than query heads."""
    tower = naflex()
    small = dict(head_dim=32, num_kv_heads=1, intermediate_size=96, patch_size=4, position_embedding_size=16)
    tower.model = timm.create_model("gemma4_vit_167m", **SMALL | small)
    return tower


TOWERS = {
    "eva": lambda: by_name("eva_giant_patch14_224", 56),
    "eva02": lambda: by_name("eva02_tiny_patch14_224", 56),
    "eva02_clip": lambda: by_name("eva02_base_patch16_clip_224"),
    "eva_norms": lambda: eva(qk_norm=True, scale_attn_inner=True, use_rot_pos_emb=True),
    "eva_grouped_query": lambda: eva(num_kv_heads=1, attn_type="rope", qkv_fused=False, use_rot_pos_emb=True),
    "pe": lambda: by_name("vit_pe_core_tiny_patch16_384"),
    "rope_axial": lambda: by_name("vit_small_patch16_rope_224"),
    "rope_mixed": lambda: by_name("vit_small_patch16_rope_mixed_224"),
    "dinov3": lambda: by_name("vit_small_patch16_dinov3"),
    "vit": lambda: by_name("vit_tiny_patch16_224"),
    "naflex": naflex,
    "naflex_key_mask": lambda: naflex(use_key_only_attn_mask=True, reg_tokens=2),
    "naflex_axial": lambda: naflex(rope_type="axial", pos_embed="none", class_token=True, attn_gated=True),
    "naflex_mixed": lambda: naflex(rope_type="mixed", pos_embed="none", reg_tokens=1),
    "naflex_dinov3": lambda: naflex(rope_type="dinov3", pos_embed="none", rope_rotate_half=True),
    "gemma4": gemma4,
    "naflex_mrope": lambda: naflex(rope_type="mrope", pos_embed="none", rope_mrope_section=(4, 6, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TOWERS)
def test_outputs_and_gradients(name, dtype, monkeypatch):
    check_parity(TOWERS[name](), patch_timm, dtype, monkeypatch)


def test_learned_frequencies_get_their_gradient():
    tower = TOWERS["rope_mixed"]()
    randomize(tower.model)
    patch_timm(tower.model)
    tower.model(**tower.inputs).sum().backward()
    assert tower.model.rope.freqs.grad.abs().max() > 0


def test_unpatch():
    tower = TOWERS["eva02"]()
    tower.model.eval()
    before = tower.model(**tower.inputs)
    names = patch_timm(tower.model)
    assert names == ["blocks.0.attn", "blocks.1.attn"]
    assert unpatch(tower.model) == names
    assert torch.equal(tower.model(**tower.inputs), before)


def test_wrappers_of_other_libraries():
    """Put on after patching, one stays when the model is unpatched and patched again; before, patching refuses by name."""
    tower, calls = TOWERS["eva02"](), []
    model = tower.model.eval()
    before = model(**tower.inputs)
    names = patch_timm(model)
    attention = model.blocks[1].attn

    def wrap(inner):
        def wrapper(*args, **kwargs):
            calls.append(inner)
            return inner(*args, **kwargs)

        attention.forward = wrapper

    wrap(attention.forward)
    wrapper = attention.forward
    assert unpatch(model) == names and attention.forward is wrapper
    assert torch.equal(model(**tower.inputs), before) and len(calls) == 1
    assert patch_timm(model) == names and attention.forward is wrapper
    torch.testing.assert_close(model(**tower.inputs), before)
    assert len(calls) == 2

    model = TOWERS["eva02"]().model
    attention = model.blocks[1].attn
    wrap(attention.forward)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn: its forward was replaced on the instance"):
        patch_timm(model)
    assert "forward" not in model.blocks[0].attn.__dict__


def same_output(module, x):
    """Of a module, and of its class without our forward."""
    return torch.allclose(module(x), timm.layers.Attention.forward(module, x), atol=1e-5)


def test_copies_and_replicas_run_on_their_own_weights():
    """A replica is what torch.nn.DataParallel makes of a module on each GPU: its attributes, and parameters of its own."""
    tower = TOWERS["vit"]()
    patch_timm(tower.model.eval())
    attention, x = tower.model.blocks[0].attn, torch.randn(2, 5, 64)
    before = attention(x)
    for duplicate in (copy.copy(attention), attention._replicate_for_data_parallel()):
        duplicate._modules = {name: copy.deepcopy(child) for name, child in duplicate._modules.items()}
        with torch.no_grad():
            duplicate.proj.weight.mul_(2)
        assert same_output(duplicate, x) and not torch.allclose(duplicate(x), before)
        assert torch.equal(attention(x), before)


def test_copies_are_patched_and_can_be_unpatched():
    model = TOWERS["vit"]().model.eval()
    names, x = patch_timm(model), torch.randn(2, 3, 64, 64)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(duplicate(x), model(x))
        assert repr(duplicate) == repr(model)
        assert unpatch(duplicate) == names
        assert type(duplicate.blocks[0].attn) is timm.layers.Attention
    assert unpatch(model) == names and type(model.blocks[0].attn) is timm.layers.Attention


def test_the_refusal_tells_classes_of_one_name_apart():
    beit = timm.create_model("beit_base_patch16_224", img_size=32, **SMALL)
    with pytest.raises(ValueError, match=r"it has beit\.Attention\. Known for timm: attention\.Attention,"):
        patch_timm(beit)


def test_patch_dropout_gives_every_image_its_own_positions():
    tower = by_name("vit_small_patch16_dinov3", patch_drop_rate=0.5)
    randomize(tower.model)
    tower.model.train()
    torch.manual_seed(0)
    before = tower.model(**tower.inputs)
    patch_timm(tower.model)
    torch.manual_seed(0)
    torch.testing.assert_close(tower.model(**tower.inputs), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", (1, 2, 6))  # 6: as many as tokens, where [6, 6] could also be a padding mask
@pytest.mark.parametrize("additive", (False, True))
def test_a_mask_of_two_dimensions_is_that_of_all_images(images, additive):
    tower = TOWERS["vit"]()
    attention, x = tower.model.eval().blocks[0].attn, torch.randn(images, 6, 64)
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
    if additive:
        mask = torch.zeros(6, 6).masked_fill(~mask, -torch.inf)
    before = attention(x, attn_mask=mask)
    patch_timm(tower.model)
    torch.testing.assert_close(attention(x, attn_mask=mask), before, rtol=1e-4, atol=1e-5)


def test_refusals():
    tower = by_name("vit_tiny_patch16_224", attn_drop_rate=0.1)
    patch_timm(tower.model)
    with pytest.raises(UnsupportedCall, match=r"attn_drop 0\.1"):
        tower.model.train()(**tower.inputs)
    tower.model.eval()(**tower.inputs)
    with pytest.raises(UnsupportedCall, match="bidirectional"):
        tower.model.blocks[0].attn(torch.randn(1, 4, 64), is_causal=True)
    patch_timm(tower.model, on_unsupported="original")
    tower.model.train()(**tower.inputs)
    with pytest.raises(ValueError, match=r"eva\.EvaAttention"):
        patch_timm(timm.create_model("resnet18"))
