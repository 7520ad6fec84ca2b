"""VisionEncoder against the towers of transformers, and the properties of C-RoPE."""

import copy

import pytest
import torch
from PIL import Image
from towers import GRID, PATCH, TOWERS, make_tower

from comp import VisionEncoder
from comp.data.images import merge_order, patchify, to_raster
from comp.model import ViTConfig
from comp.model.positions import patch_positions, rotary_tables


def small_config(**choices) -> ViTConfig:
    tower = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, patch_size=4, image_size=24)
    return ViTConfig.from_hugging_face({"model_type": "siglip_vision_model", **tower}, **choices)


def small_encoder(**choices) -> VisionEncoder:
    torch.manual_seed(0)
    encoder = VisionEncoder(small_config(**choices)).eval()
    encoder.reset_parameters(std=0.2)
    return encoder


def random_patches(grids, patch_dim=48):
    return torch.randn(sum(t * h * w for t, h, w in grids), patch_dim), torch.tensor(grids)


def patch_tokens(tower, name, images):
    """[images, h * w, D] in raster order, from the library's tower; before SigLIP's post_layernorm, as CoMP uses it."""
    height, width = images.shape[2] // PATCH, images.shape[3] // PATCH
    if name == "siglip2":
        patches = images.unflatten(3, (width, PATCH)).unflatten(2, (height, PATCH)).permute(0, 2, 4, 3, 5, 1)
        inputs = dict(
            pixel_values=patches.reshape(len(images), height * width, -1),
            pixel_attention_mask=torch.ones(len(images), height * width, dtype=torch.long),
            spatial_shapes=torch.tensor([[height, width]] * len(images)),
        )
    else:
        inputs = dict(pixel_values=images)
        if name in ("siglip", "clip"):
            inputs["interpolate_pos_encoding"] = True
    with torch.no_grad():
        output = tower(**inputs, output_hidden_states=True)
    features = output.hidden_states[-1] if name.startswith("siglip") else output.last_hidden_state
    return features[:, -height * width :]


def assert_same(ours, theirs, tolerance=1e-5):
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"max relative error {error:.1e}"


# The library's AIMv2 with a learned table takes its pre-training size only: no peer for another grid.
PARITY = [(name, (GRID, GRID)) for name in TOWERS] + [(name, (4, 10)) for name in TOWERS if name != "aimv2"]


@pytest.mark.parametrize("name, size", PARITY)
def test_equals_the_tower_of_transformers(name, size, tower_directory):
    encoder = VisionEncoder.from_pretrained(tower_directory(name), keep_prefix_tokens=True)
    assert encoder.pos_mode == "abs"
    images = torch.randn(2, 3, size[0] * PATCH, size[1] * PATCH)
    pixel_values = torch.cat([patchify(image.unsqueeze(0), PATCH, 2) for image in images])
    grid_thw = torch.tensor([[1, *size]] * 2)
    with torch.no_grad():
        maps = to_raster(encoder(pixel_values, grid_thw), grid_thw, 2)
    assert_same(torch.cat(maps).flatten(1, 2), patch_tokens(make_tower(name), name, images))


def test_siglip_with_its_final_norm(tower_directory):
    encoder = VisionEncoder.from_pretrained(tower_directory("siglip"), final_norm=True)
    image = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        ours = to_raster(encoder(patchify(image, PATCH, 2), torch.tensor([[1, 6, 6]])), [(1, 6, 6)], 2)[0].flatten(1, 2)
        assert_same(ours, make_tower("siglip")(image).last_hidden_state)


@pytest.mark.parametrize("name", ["siglip", "dinov2_registers", "clip"])
def test_packing_gives_each_image_its_own_result(name, tower_directory):
    encoder = VisionEncoder.from_pretrained(tower_directory(name), pos_mode="abs+rope", keep_prefix_tokens=True)
    grids = [(1, 4, 6), (1, 2, 2), (2, 4, 4), (1, 10, 2)]
    pixel_values, grid_thw = random_patches(grids)
    with torch.no_grad():
        packed = encoder(pixel_values, grid_thw)
        start = 0
        for grid in grids:
            end = start + grid[0] * grid[1] * grid[2]
            torch.testing.assert_close(
                packed[start:end], encoder(pixel_values[start:end], torch.tensor([grid])), rtol=1e-5, atol=1e-5
            )
            start = end


def test_frames_are_images_of_their_own():
    encoder = small_encoder(pos_mode="abs+rope")
    pixel_values, _ = random_patches([(3, 4, 6)])
    with torch.no_grad():
        frames = encoder(pixel_values, torch.tensor([[3, 4, 6]]))
        images = encoder(pixel_values, torch.tensor([[1, 4, 6]] * 3))
    torch.testing.assert_close(frames, images, rtol=1e-6, atol=1e-6)


def test_merge_order_is_raster_order_permuted():
    """Attention does not care about order: blocks of 2 x 2 give what raster order gives, permuted."""
    blocks = small_encoder(pos_mode="abs+rope")
    raster = VisionEncoder(small_config(pos_mode="abs+rope", merge_size=1)).eval()
    raster.load_state_dict(blocks.state_dict())
    pixel_values, grid_thw = random_patches([(1, 4, 6)])
    order = merge_order(4, 6, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            blocks(pixel_values[order], grid_thw), raster(pixel_values, grid_thw)[order], rtol=1e-5, atol=1e-5
        )


def table_entries(encoder, grid):
    """Which (row, column) of the table each patch of a grid receives, by a table that holds its own coordinates."""
    side = encoder.config.grid_size
    with torch.no_grad():
        coordinates = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1)
        encoder.pos_embed.zero_()[..., :2] = coordinates.float()
    rows = encoder._position_table([grid], torch.device("cpu"))[:, :2]
    return [tuple(row) for row in rows.round().long().tolist()]


def test_order_switch_on_a_hand_made_grid():
    """A table of 6 x 6 whose entries name their place; on its own grid the two orders differ as the release does."""
    merge = table_entries(small_encoder(), (1, 6, 6))
    assert merge[:8] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    legacy = table_entries(small_encoder(abs_pos_order="raster_legacy"), (1, 6, 6))
    assert legacy[:8] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1)]


def test_order_switch_on_a_4x6_grid():
    """The defect of the released code in closed form: token k of a band of two rows gets row 2 b + (k >= w), column k mod w."""
    h, w = 4, 6
    positions = patch_positions([(1, h, w)], 2)
    table = torch.arange(h * w).view(h, w, 1)
    for order, expected in (
        ("merge", positions[:, 0] * w + positions[:, 1]),
        ("raster_legacy", torch.tensor([(2 * band + (k >= w)) * w + k % w for band in range(h // 2) for k in range(2 * w)])),
    ):
        encoder = small_encoder(abs_pos_order=order)
        encoder._table_for = lambda *size: table
        assert encoder._position_table([(1, h, w)], torch.device("cpu")).flatten().tolist() == expected.tolist()


def test_order_changes_the_output():
    pixel_values, grid_thw = random_patches([(1, 4, 6)])
    merge, legacy = small_encoder(), small_encoder(abs_pos_order="raster_legacy")
    with torch.no_grad():
        assert (merge(pixel_values, grid_thw) - legacy(pixel_values, grid_thw)).abs().max() > 1e-2


def test_rotary_products_depend_on_the_relative_position_only():
    head_dim, shift = 16, torch.tensor([3, 5])
    q, k = torch.randn(2, head_dim, dtype=torch.float64)
    positions = torch.tensor([[0, 0], [2, 7], [4, 1]])

    def product(q_position, k_position):
        tables = [rotary_tables(p.unsqueeze(0), head_dim, base=1e4, dtype="fp32") for p in (q_position, k_position)]
        rotated = []
        for x, (cos, sin) in zip((q, k), tables):
            first, second = x.chunk(2)
            rotated.append(torch.cat((first * cos[0] - second * sin[0], second * cos[0] + first * sin[0])))
        return rotated[0] @ rotated[1]

    for a in positions:
        for b in positions:
            torch.testing.assert_close(product(a, b), product(a + shift, b + shift), rtol=1e-5, atol=1e-5)
    assert (product(positions[0], positions[1]) - product(positions[0], positions[2])).abs() > 1e-3


def test_rotary_channels_turn_with_row_then_column():
    cos, sin = rotary_tables(torch.tensor([[3, 0], [0, 3]]), 16, base=1e4, dtype="fp32")
    angles = 3 * 1e4 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(cos[0], torch.cat((angles.cos(), torch.ones(4))))
    torch.testing.assert_close(sin[1], torch.cat((torch.zeros(4), angles.sin())))


def recorded_tables(monkeypatch) -> list:
    """The (cos, sin) of every attention call from here on."""
    from comp.model import vision_encoder

    seen = []
    real = vision_encoder.rope_attention
    monkeypatch.setattr(vision_encoder, "rope_attention", lambda *a, **k: (seen.append(a[3:5]), real(*a, **k))[1])
    return seen


def test_prefix_tokens_are_not_rotated(tower_directory, monkeypatch):
    seen = recorded_tables(monkeypatch)
    encoder = VisionEncoder.from_pretrained(tower_directory("dinov2_registers"), pos_mode="rope", keep_prefix_tokens=True)
    grids = [(2, 2, 2), (1, 2, 4)]
    pixel_values, grid_thw = random_patches(grids)
    encoder(pixel_values, grid_thw)
    cos, sin = seen[0]
    expected_cos, expected_sin = rotary_tables(patch_positions(grids, 2), 16, base=1e4, dtype="fp32")
    is_patch = torch.tensor([False] * 4 + [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4 + [True] * 8)
    assert torch.equal(cos[is_patch], expected_cos) and torch.equal(sin[is_patch], expected_sin)
    assert cos[~is_patch].eq(1).all() and sin[~is_patch].eq(0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_angles_stay_float32(autocast, monkeypatch):
    """Neither a cast of the module nor autocast reaches the rotary tables; "bf16_legacy" rounds them on purpose."""
    seen = recorded_tables(monkeypatch)
    pixel_values, grid_thw = random_patches([(1, 74, 2)])
    positions = patch_positions([(1, 74, 2)], 2).double()
    exact = (positions.unsqueeze(-1) * 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)).transpose(1, 2).flatten(1)
    exact = torch.cat((exact[:, 0::2], exact[:, 1::2]), dim=1)
    errors = {}
    for dtype in ("fp32", "bf16_legacy"):
        encoder = small_encoder(pos_mode="rope", rope_dtype=dtype)
        encoder = encoder if autocast else encoder.to(torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = encoder(pixel_values, grid_thw)
        assert features.isfinite().all()
        cos, sin = (table[: len(exact)] for table in seen.pop())  # under autocast rows are filled up
        assert cos.dtype == sin.dtype == torch.float32
        errors[dtype] = max((cos - exact.cos()).abs().max(), (sin - exact.sin()).abs().max())
    assert errors["fp32"] < 1e-5 and errors["bf16_legacy"] > 1e-2


def test_pos_mode_can_change_between_stages():
    encoder = small_encoder()
    pixel_values, grid_thw = random_patches([(1, 4, 6)])
    outputs = {}
    for mode in ("abs", "rope", "abs+rope"):
        encoder.pos_mode = mode
        outputs[mode] = encoder(pixel_values, grid_thw).detach()
    assert all((outputs["abs"] - outputs[mode]).abs().max() > 1e-3 for mode in ("rope", "abs+rope"))
    encoder.pos_mode = "abs"
    assert torch.equal(encoder(pixel_values, grid_thw), outputs["abs"])
    with torch.no_grad():
        encoder.pos_embed.add_(1)
        encoder.pos_mode = "rope"
        assert torch.equal(encoder(pixel_values, grid_thw), outputs["rope"]), '"rope" does not read the table'
    with pytest.raises(ValueError, match=r"pos_mode must be one of .*, got 'rotary'"):
        encoder.pos_mode = "rotary"


def test_tables_are_resampled_once_per_distinct_grid(monkeypatch):
    encoder = small_encoder()
    calls = []
    real = encoder._table_for
    monkeypatch.setattr(encoder, "_table_for", lambda h, w, device: (calls.append((h, w)), real(h, w, device))[1])
    pixel_values, grid_thw = random_patches([(1, 4, 6), (2, 4, 6), (1, 2, 2), (1, 4, 6)])
    first = encoder(pixel_values, grid_thw)
    assert sorted(calls) == [(2, 2), (4, 6)]
    encoder(pixel_values, grid_thw)
    assert len(calls) == 4, "a table that trains is resampled in every step"
    encoder.requires_grad_(False)
    for _ in range(3):
        assert torch.equal(encoder(pixel_values, grid_thw), first)
    assert len(calls) == 6, "a frozen table is kept"
    encoder.pos_embed.add_(1.0)
    assert not torch.equal(encoder(pixel_values, grid_thw), first), "until it changes"


def test_every_parameter_gets_a_gradient_with_and_without_checkpointing(tower_directory):
    for name in TOWERS:
        encoder = VisionEncoder.from_pretrained(tower_directory(name), pos_mode="abs+rope", keep_prefix_tokens=True)
        pixel_values, grid_thw = random_patches([(1, 4, 6), (1, 2, 4)])
        gradients = []
        for checkpointing in (False, True):
            encoder.gradient_checkpointing = checkpointing
            encoder.zero_grad()
            encoder(pixel_values, grid_thw).square().sum().backward()
            gradients.append({key: p.grad.clone() for key, p in encoder.named_parameters()})
        for key, gradient in gradients[0].items():
            assert gradient.abs().max() > 0, f"{name}: {key}"
            assert torch.equal(gradient, gradients[1][key]), f"{name}: {key}"


def test_return_layers():
    encoder = small_encoder()
    pixel_values, grid_thw = random_patches([(1, 4, 6)])
    with torch.no_grad():
        features, taps = encoder(pixel_values, grid_thw, return_layers=[0, -1])
        shorter = copy.deepcopy(encoder)
        shorter.blocks = shorter.blocks[:1]
        assert torch.equal(taps[-1], features) and torch.equal(taps[0], shorter(pixel_values, grid_thw))
        _, both = encoder(pixel_values, grid_thw, return_layers=[1, -1])
        assert torch.equal(both[1], features) and torch.equal(both[-1], features), "two numbers of one block"
    with pytest.raises(ValueError, match=r"return_layers must lie in -2 .. 1, got 2"):
        encoder(pixel_values, grid_thw, return_layers=[2])


def test_encode_gives_raster_maps():
    encoder = small_encoder(pos_mode="abs+rope")
    images = [Image.effect_noise((40, 24), 80).convert("RGB"), Image.effect_noise((16, 16), 80)]
    maps = encoder.encode(images)
    assert [tuple(one.shape) for one in maps] == [(6, 10, 48), (4, 4, 48)]
    alone = encoder.encode(images[0])[0]
    torch.testing.assert_close(maps[0], alone, rtol=1e-5, atol=1e-5)
    pixel_values, (t, h, w) = encoder.prepare(images[0])
    with torch.no_grad():
        features = encoder(pixel_values, torch.tensor([[t, h, w]]))
    assert torch.equal(alone.flatten(0, 1)[merge_order(h, w, 2)], features)
    assert encoder.encode([]) == []
    assert encoder.encode(images[0], size=(16, 16))[0].shape == (4, 4, 48)


def test_bfloat16_is_close_to_float32():
    encoder = small_encoder(pos_mode="abs+rope")
    pixel_values, grid_thw = random_patches([(1, 4, 6)])
    with torch.no_grad():
        exact = encoder(pixel_values, grid_thw)
        rounded = encoder.bfloat16()(pixel_values, grid_thw)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.02


def test_errors_name_what_is_wrong():
    encoder = small_encoder()
    pixel_values, grid_thw = random_patches([(1, 4, 6)])
    with pytest.raises(ValueError, match="pixel_values has 23 patches but grid_thw describes 24"):
        encoder(pixel_values[:-1], grid_thw)
    with pytest.raises(ValueError, match=r"pixel_values must be \[N, 48\], got \(24, 47\)"):
        encoder(pixel_values[:, :-1], grid_thw)
    with pytest.raises(ValueError, match="multiples of merge_size = 2, got 3 x 8"):
        encoder(pixel_values, torch.tensor([[1, 3, 8]]))
    with pytest.raises(ValueError, match=r"grid_thw must be integers \[M, 3\], got torch.float32"):
        encoder(pixel_values, grid_thw.float())
    with pytest.raises(ValueError, match="at least one image"):
        encoder(pixel_values[:0], grid_thw[:0])
    with pytest.raises(ValueError, match="abs_pos_order must be one of"):
        small_config(abs_pos_order="column")
    with pytest.raises(ValueError, match=r"model_type must be one of .*, got 'resnet'"):
        ViTConfig.from_hugging_face({"model_type": "resnet"})
    with pytest.raises(ValueError, match="align_corners and antialias"):
        small_config(align_corners=True, antialias=True)
