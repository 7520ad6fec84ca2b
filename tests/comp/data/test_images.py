"""Resizing, patches and their order, on cases small enough to write down."""

import numpy as np
import pytest
import torch
from PIL import Image

from comp.data.images import merge_order, patchify, prepare_image, smart_resize, to_merge_order, to_raster, to_rgb

# Grid 4 x 6, blocks of 2 x 2: (row, column) of every patch, in order
MERGE_ORDER_4x6 = [
    *[(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (0, 4), (0, 5), (1, 4), (1, 5)],
    *[(2, 0), (2, 1), (3, 0), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3), (2, 4), (2, 5), (3, 4), (3, 5)],
]


def test_merge_order_of_a_hand_made_grid():
    assert [(int(i) // 6, int(i) % 6) for i in merge_order(4, 6, 2)] == MERGE_ORDER_4x6
    assert merge_order(3, 5, 1).tolist() == list(range(15))


def test_raster_round_trip_of_several_images_and_frames():
    grids = [(1, 4, 6), (3, 2, 2), (1, 6, 4)]
    maps = [torch.randn(t, h, w, 5) for t, h, w in grids]
    packed = torch.cat([to_merge_order(one, 2).flatten(0, 1) for one in maps])
    for back, one in zip(to_raster(packed, torch.tensor(grids), 2), maps):
        assert torch.equal(back, one)
    assert torch.equal(packed[:24], maps[0].flatten(0, 2)[merge_order(4, 6, 2)])


def test_patchify_agrees_with_a_convolution():
    conv = torch.nn.Conv2d(3, 7, kernel_size=4, stride=4, bias=False)
    frames = torch.randn(2, 3, 16, 24)
    patches = patchify(frames, patch_size=4, merge_size=2)
    assert patches.shape == (2 * 4 * 6, 48)
    features = to_raster(patches @ conv.weight.flatten(1).T, [(2, 4, 6)], 2)[0]
    torch.testing.assert_close(features.permute(0, 3, 1, 2), conv(frames), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "side, resized, tokens",
    [(384, 392, 196), (1024, 1036, 1369), (448, 448, 256), (504, 504, 324), (518, 504, 324), (672, 672, 576)],
)
def test_smart_resize_table(side, resized, tokens):
    """The sizes of CoMP's stages and evaluations: patch 14, blocks of 2 x 2."""
    height, width = smart_resize(side, side, factor=28, min_pixels=4 * 28 * 28, max_pixels=3000 * 28 * 28)
    assert (height, width) == (resized, resized)
    assert (height // 28) * (width // 28) == tokens


@pytest.mark.parametrize(
    "height, width", [(28, 40000), (40000, 28), (1, 1), (1, 3000), (5, 7), (1000, 3), (2000, 3001), (27, 29)]
)
@pytest.mark.parametrize("min_tokens, max_tokens", [(4, 1024), (1, 16), (4, 3000), (256, 256)])
def test_smart_resize_of_extreme_sizes(height, width, min_tokens, max_tokens):
    bounds = dict(min_pixels=min_tokens * 28 * 28, max_pixels=max_tokens * 28 * 28)
    new_height, new_width = smart_resize(height, width, factor=28, **bounds)
    assert new_height >= 28 and new_width >= 28
    assert new_height % 28 == 0 and new_width % 28 == 0
    assert new_height * new_width <= bounds["max_pixels"]
    ratio = max(height, width) / min(height, width)
    if ratio < min_tokens:  # otherwise a side of one block may have to do
        assert new_height * new_width >= bounds["min_pixels"] or min_tokens == max_tokens


def test_smart_resize_keeps_what_fits():
    assert smart_resize(280, 560, factor=28, min_pixels=3136, max_pixels=10**6) == (280, 560)


def test_smart_resize_errors():
    with pytest.raises(ValueError, match="at least 1 pixel, got 0 x 5"):
        smart_resize(0, 5, factor=28, min_pixels=0, max_pixels=10**6)
    with pytest.raises(ValueError, match="max_pixels 500"):
        smart_resize(50, 50, factor=28, min_pixels=0, max_pixels=500)


def test_prepare_image_resizes_once_and_normalises():
    image = Image.new("RGB", (50, 30), (255, 0, 0))
    patches, grid = prepare_image(image, patch_size=4, merge_size=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert grid == (1, 8, 12) and patches.shape == (96, 48)
    expected = torch.tensor([1.0, -1.0, -1.0]).repeat_interleave(16).expand(96, -1)
    torch.testing.assert_close(patches, expected)


def test_prepare_image_fixed_size_and_colour_modes():
    settings = dict(patch_size=4, merge_size=2, mean=(0.0,) * 3, std=(1.0,) * 3, size=(16, 24))
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK"):
        patches, grid = prepare_image(Image.new(mode, (11, 13)), **settings)
        assert grid == (1, 4, 6) and patches.shape == (24, 48)
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert prepare_image(transparent, **settings)[0].eq(1).all(), "transparent parts show white"


def test_grey_of_16_bits_keeps_its_shades(tmp_path):
    shades = np.array([[0, 257 * 10, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 10, 128, 255]


def test_upright_by_exif():
    image = Image.new("RGB", (40, 16), "black")
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter
    image.info["exif"] = exif.tobytes()
    _, grid = prepare_image(image, patch_size=4, merge_size=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert grid == (1, 10, 4)


def test_order_errors():
    with pytest.raises(ValueError, match="multiples of merge_size = 2, got 3 x 4"):
        merge_order(3, 4, 2)
    with pytest.raises(ValueError, match="must have the 8 patches that grid_thw describes, got 7"):
        to_raster(torch.zeros(7, 2), [(1, 2, 4)], 2)
    with pytest.raises(ValueError, match="multiples of patch_size = 4, got 10 x 8"):
        patchify(torch.zeros(1, 3, 10, 8), 4, 2)
