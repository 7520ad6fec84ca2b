"""Where patches are: row and column of each, the interpolated position table, and the 2D rotary tables (C-RoPE).

Grids are Python lists of (t, h, w): one read of `grid_thw` serves the whole forward pass.
Source: CoMP, arXiv 2503.18931v2, Eqs. 1 to 4, with the released code's frequencies: base^(-4 j / D) for each axis, channel
pairs (j, j + D / 2), the first D / 4 pairs turn with the row, the next D / 4 with the column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from comp_kernels import axial_freqs, rope_tables

from ..data.images import merge_order, to_merge_order

Grids = Sequence[tuple[int, int, int]]


def patch_positions(grids: Grids, merge_size: int) -> Tensor:
    """(row, column) of every patch of all frames, [N, 2] int64 on the CPU, in merge-block order."""
    per_size = {}
    for _, h, w in grids:
        if (h, w) not in per_size:
            index = merge_order(h, w, merge_size)
            per_size[h, w] = torch.stack((index // w, index % w), dim=1)
    return torch.cat([per_size[h, w].repeat(t, 1) for t, h, w in grids])


def rotary_tables(positions: Tensor, head_dim: int, *, base: float, dtype: str) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, head_dim / 2] float32, one value per channel pair, for positions [T, 2].

    Frequencies are made from Python numbers at every call: there is no buffer that a cast of the module could round.
    dtype "bf16_legacy" rounds frequencies, positions and angles to bfloat16, as casting the released code did.
    """
    freqs = axial_freqs(head_dim, base)[:, : head_dim // 2].to(positions.device)
    if dtype == "fp32":
        return rope_tables(positions, freqs)
    angles = (positions.bfloat16().unsqueeze(-1) * freqs.bfloat16()).sum(1)  # one axis is zero: the sum adds no rounding
    return angles.cos().float(), angles.sin().float()


def resample_table(
    table: Tensor, height: int, width: int, *, mode: str, align_corners: bool = False, antialias: bool = False
) -> Tensor:
    """Learned table [G, G, D] -> [height, width, D] float32; exactly the table when the sizes agree."""
    table = table.float()
    if table.shape[:2] == (height, width):
        return table
    channels_first = table.permute(2, 0, 1).unsqueeze(0)
    resampled = F.interpolate(channels_first, size=(height, width), mode=mode, align_corners=align_corners, antialias=antialias)
    return resampled.squeeze(0).permute(1, 2, 0)


def sincos_table(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Computed table of AIMv2 "native", [height, width, dim] float32: sin x, cos x, sin y, cos y of dim / 4 frequencies."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64).outer(omega) for n in (height, width))
    rows = torch.cat((rows.sin(), rows.cos()), dim=1).unsqueeze(1).expand(height, width, -1)
    columns = torch.cat((columns.sin(), columns.cos()), dim=1).unsqueeze(0).expand(height, width, -1)
    return torch.cat((columns, rows), dim=-1).to(device, torch.float32)


def in_token_order(table: Tensor, order: str, merge_size: int) -> Tensor:
    """[h, w, D] -> [h * w, D]: permuted like the patches ("merge"), or left in raster order ("raster_legacy")."""
    return to_merge_order(table, merge_size) if order == "merge" else table.flatten(0, 1)
