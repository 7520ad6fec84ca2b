"""Pictures of what a vision encoder sees, before and after a run: principal components, attention, position table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comp_kernels.ops.rope_attention.reference import rotate

from ...data.images import to_raster
from ...model import VisionEncoder
from ...model.vision_encoder import Block


def draw_encoders(encoders: dict[str, VisionEncoder], images: Sequence[Image.Image], folder: Path) -> list[tuple[Path, str]]:
    """Draw what each of the labelled `encoders` makes of `images`; (file, caption) of every drawing."""
    maps = {
        "features": (
            feature_colours,
            "Features of the patches, their three largest principal components as red, green and blue. "
            "Like colours are like features; colours do not compare between pictures.",
        ),
        "attention": (
            centre_attention,
            "Attention of the patch in the centre in the last block, mean of all heads. Brighter is more.",
        ),
    }
    drawn, columns = [], 1 + len(encoders)
    for name, (draw, caption) in maps.items():
        figure, axes = plt.subplots(len(images), columns, figsize=(3 * columns, 2.6 * len(images)), squeeze=False)
        for row, image in zip(axes, images):
            row[0].imshow(image)
            for ax, encoder in zip(row[1:], encoders.values()):
                ax.imshow(draw(encoder, image))
        for ax, title in zip(axes[0], ("picture", *encoders)):
            ax.set_title(title)
        drawn.append((save(figure, axes, folder / f"{name}.png"), caption))
    tables = {label: encoder.pos_embed for label, encoder in encoders.items() if encoder.pos_embed is not None}
    if len(tables) == len(encoders):
        drawn.append(draw_position_tables(tables, folder / "positions.png"))
    return drawn


def save(figure: plt.Figure, axes: np.ndarray, path: Path) -> Path:
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def feature_colours(encoder: VisionEncoder, image: Image.Image) -> np.ndarray:
    """[h, w, 3] in [0, 1]."""
    (features,) = encoder.encode(image)  # [h, w, D]
    flat = features.flatten(0, 1)
    flat = flat - flat.mean(0)
    directions = torch.linalg.svd(flat, full_matrices=False)[2][:3]
    colours = flat @ directions.T
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    colours = ((colours - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.unflatten(0, features.shape[:2]).numpy()


def centre_attention(encoder: VisionEncoder, image: Image.Image) -> np.ndarray:
    """[h, w]: how much the patch in the centre of the grid attends to each patch in the last block."""
    seen = []
    last = encoder.blocks[-1]
    assert isinstance(last, Block)
    attention = last.attn
    hook = attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    try:
        (features,) = encoder.encode(image)
    finally:
        hook.remove()
    x, cos, sin = seen[0][:3]
    rows, columns = features.shape[:2]
    with torch.no_grad():
        q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)  # [T, H, K]
        if cos is not None:
            head_dim = q.shape[-1]
            q, k = (rotate(one, cos, sin, head_dim, head_dim // 2) for one in (q, k))
        scores = torch.einsum("ihk,jhk->hij", q, k) * q.shape[-1] ** -0.5
        weights = scores.softmax(-1).mean(0)[-rows * columns :, -rows * columns :]  # without prefix tokens

    def raster(values: Tensor) -> Tensor:  # [N, C] in merge-block order -> [h, w, C]
        return to_raster(values, torch.tensor([[1, rows, columns]]), encoder.config.merge_size)[0].squeeze(0)

    place = raster(torch.arange(rows * columns).unsqueeze(1))[rows // 2, columns // 2, 0]
    return raster(weights[place].unsqueeze(1))[..., 0].numpy()


def draw_position_tables(tables: Mapping[str, Tensor], path: Path) -> tuple[Path, str]:
    """tables: [G, G, D] each."""
    figure, axes = plt.subplots(1, 2 * len(tables), figsize=(3 * len(tables) * 2, 3.2), squeeze=False)
    for number, (label, learned) in enumerate(tables.items()):
        table = torch.nn.functional.normalize(learned.detach().float(), dim=-1)
        side = table.shape[0]
        for ax, (row, column) in zip(axes[0, 2 * number :], ((side // 2, side // 2), (0, 0))):
            ax.imshow((table @ table[row, column]).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
            ax.plot(column, row, "k+")
            ax.set_title(label)
    return save(figure, axes, path), "Learned position table: cosine similarity of the entry at the cross with all others."
