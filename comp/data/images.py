"""Images in, patches out: one resize to a grid of patches, merge-block order, and the way back to raster order.

A vision transformer followed by an m x m merge wants the m * m patches of a block next to each other. Patches are therefore
ordered by (block row, block column, row in block, column in block). For a grid of 4 x 6 patches and m = 2, as (row, column):

    (0,0)(0,1)(1,0)(1,1)  (0,2)(0,3)(1,2)(1,3)  (0,4)(0,5)(1,4)(1,5)  (2,0)(2,1)(3,0)(3,1) ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import MAX_PIXELS, MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS
from .decode import to_rgb


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Sides, multiples of `factor`, close to (height, width) with min_pixels <= area <= max_pixels.

    height, width: of the image, in pixels. factor: patch size times merge size, in pixels.
    Each side is rounded to the nearest multiple; if the area is then too large both sides shrink (rounded down), if too small
    both grow (rounded up), keeping the aspect ratio. A side never falls below `factor`; for extreme ratios, where that alone
    would break max_pixels, the long side is cut to what max_pixels allows.
    Raises ValueError for sides below 1 and for bounds that no size can meet.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1 pixel, got {height} x {width}")
    if max_pixels < factor * factor or min_pixels > max_pixels:
        raise ValueError(
            f"need factor^2 <= max_pixels and min_pixels <= max_pixels, got factor {factor}, "
            f"min_pixels {min_pixels}, max_pixels {max_pixels}"
        )
    new_height, new_width = (max(factor, round(side / factor) * factor) for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(max_pixels / (height * width))
        new_height, new_width = (max(factor, math.floor(side * shrink / factor) * factor) for side in (height, width))
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    longest = max_pixels // (factor * min(new_height, new_width)) * factor
    return min(new_height, longest), min(new_width, longest)


def sides(
    height: int, width: int, *, factor: int, min_tokens: int, max_tokens: int, size: tuple[int, int] | None
) -> tuple[int, int]:
    """(height, width) in pixels that `prepare_image` gives an image of these sides."""
    if size is not None:
        height, width = (max(factor, round(side / factor) * factor) for side in size)
        return height, width
    pixels = factor * factor
    return smart_resize(height, width, factor=factor, min_pixels=min_tokens * pixels, max_pixels=max_tokens * pixels)


def merge_order(height: int, width: int, merge_size: int) -> Tensor:
    """Raster index of each patch in merge-block order: [height * width] int64, for a grid of height x width patches."""
    check_grid(height, width, merge_size)
    index = torch.arange(height * width).view(height // merge_size, merge_size, width // merge_size, merge_size)
    return index.transpose(1, 2).flatten()


def check_grid(height: int, width: int, merge_size: int) -> None:
    """Refuse a grid whose sides are not positive multiples of merge_size."""
    if min(height, width) < 1 or height % merge_size or width % merge_size:
        raise ValueError(f"grid sides must be positive multiples of merge_size = {merge_size}, got {height} x {width} patches")


def to_merge_order(x: Tensor, merge_size: int) -> Tensor:
    """[..., h, w, D] in raster order -> [..., h * w, D] in merge-block order."""
    *lead, height, width, dim = x.shape
    check_grid(height, width, merge_size)
    blocks = x.reshape(*lead, height // merge_size, merge_size, width // merge_size, merge_size, dim)
    return blocks.transpose(-4, -3).reshape(*lead, height * width, dim)


def to_raster(features: Tensor, grid_thw: Tensor | Sequence[Sequence[int]], merge_size: int) -> list[Tensor]:
    """Undo the merge-block order: features [N, D] of all images -> one [t, h, w, D] map per row (t, h, w) of grid_thw."""
    grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    sizes = [t * h * w for t, h, w in grids]
    if sum(sizes) != features.shape[0]:
        raise ValueError(f"features must have the {sum(sizes)} patches that grid_thw describes, got {features.shape[0]}")
    maps = []
    for part, (t, h, w) in zip(features.split(sizes), grids):
        check_grid(h, w, merge_size)
        blocks = part.view(t, h // merge_size, w // merge_size, merge_size, merge_size, -1)
        maps.append(blocks.transpose(2, 3).reshape(t, h, w, -1))
    return maps


def patchify(frames: Tensor, patch_size: int, merge_size: int) -> Tensor:
    """Frames [t, C, H, W] -> patches [t * h * w, C * P * P] in merge-block order, channels outermost inside a patch."""
    t, channels, height, width = frames.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"frames must have sides that are multiples of patch_size = {patch_size}, got {height} x {width}")
    rows, columns = height // patch_size, width // patch_size
    patches = frames.view(t, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(t, rows, columns, channels * patch_size * patch_size)
    return to_merge_order(patches, merge_size).flatten(0, 1)


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """An RGB image in the middle of a square of colour `mean` (per channel, in 0 .. 1), as LLaVA pads. One that would need a
    square of more than MAX_PIXELS is made smaller before."""
    side, largest = max(image.size), math.isqrt(MAX_PIXELS)
    if side > largest:
        width, height = (max(1, round(length * largest / side)) for length in image.size)
        image, side = image.resize((width, height), Image.Resampling.BICUBIC), largest
    square = Image.new("RGB", (side, side), tuple(round(255 * channel) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def prepare_image(
    image: Image.Image,
    *,
    patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    min_tokens: int = MIN_VISUAL_TOKENS,
    max_tokens: int = MAX_VISUAL_TOKENS,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, tuple[int, int, int]]:
    """One image to normalised patches with a single bicubic resize.

    min_tokens, max_tokens: bounds on the number of merged tokens, h * w / merge_size^2.
    size:  (height, width) in pixels for a fixed resolution instead, rounded to multiples of patch_size * merge_size.
    mean, std:  per channel, for pixels in 0 .. 1.
    max_pixels:  of the image as it comes; a larger one raises ValueError before it is decoded.
    Returns pixel_values [h * w, 3 * P * P] float32 in merge-block order and the grid (1, h, w).
    """
    image = to_rgb(image, max_pixels=max_pixels)
    height, width = sides(
        image.height, image.width, factor=patch_size * merge_size, min_tokens=min_tokens, max_tokens=max_tokens, size=size
    )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255.0
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return patchify(pixels.unsqueeze(0), patch_size, merge_size), (1, height // patch_size, width // patch_size)
