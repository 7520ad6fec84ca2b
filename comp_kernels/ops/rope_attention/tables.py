"""Rotary tables: frequencies of an axial (2D) embedding, and cos/sin tables from positions.

Everything here is float32 (float64 on request) whatever the default dtype or autocast says: angles in bfloat16 are off by up
to 0.4 rad at position 120, which is the best known way to break a rotary embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import check_choice, check_dense, check_float, check_integer, check_number, check_same, check_tensor

AXIAL_LAYOUTS = ("hwhw", "whwh", "hhww", "interleaved")


def axial_freqs(head_dim: int, base: float = 10000.0, layout: str = "hwhw", rotary_dim: int | None = None) -> Tensor:
    """Frequencies of a two-axis rotary embedding: angles = positions [T, 2] @ axial_freqs(...) [2, R], (row, column) order.

    With R = rotary_dim (default head_dim; a multiple of 4) and f_j = base^(-4 j / R), j = 0 .. R/4 - 1, the two rows of the
    result tell how fast each channel turns with the row and with the column:

        layout           channels 0 .. R-1                            pair_stride to use   used by
        "hwhw"           [h f, w f, h f, w f]                         R / 2 (default)      Qwen-VL, GLM-4V, CoMP's C-RoPE
        "whwh"           [w f, h f, w f, h f]                         R / 2                Step-3.7
        "hhww"           [h f, h f, w f, w f]                         R / 4                Gemma 4 (base 100)
        "interleaved"    [h f0, h f0, h f1, h f1, .. w f0, w f0, ..]  1                    SAM 3, timm EVA-02 style

    Returns float32 [2, R] on torch's default device. Raises ValueError for an unknown layout, an R that is not a multiple of 4,
    a base that is not positive.
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    check_integer("head_dim", head_dim)
    check_integer("rotary_dim", rotary_dim)
    check_choice("layout", layout, AXIAL_LAYOUTS)
    check_number("base", base)
    if not 0 < base < float("inf"):
        raise ValueError(f"base must be positive and finite, got {base}")
    if rotary_dim <= 0 or rotary_dim % 4 != 0 or rotary_dim > head_dim:
        raise ValueError(
            f"rotary_dim must be a positive multiple of 4 and at most head_dim = {head_dim}, got {rotary_dim}: "
            "two axes with cos/sin pairs need four channels per frequency"
        )
    quarter = rotary_dim // 4
    freqs = torch.pow(float(base), -torch.arange(quarter, dtype=torch.float64) / quarter)
    zero = torch.zeros_like(freqs)
    row, column = torch.stack((freqs, zero)), torch.stack((zero, freqs))  # [2, R/4] each
    if layout == "hwhw":
        table = torch.cat((row, column, row, column), dim=1)
    elif layout == "whwh":
        table = torch.cat((column, row, column, row), dim=1)
    elif layout == "hhww":
        table = torch.cat((row, row, column, column), dim=1)
    else:  # "interleaved"
        table = torch.cat((row, column), dim=1).repeat_interleave(2, dim=1)
    return table.to(torch.float32)


def rope_tables(positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of angles = positions @ freqs, for `rope_attention`.

    Args:
        positions:  [T, A], integer or float, A position axes (row and column of a patch, say).
        freqs:  [A, R] for all heads, or [H, A, R] with one set per head.

    Returns (cos, sin), each [T, R] or [T, H, R], float32 (float64 when freqs is float64). Differentiable in freqs (learnable
    frequencies, as in RoPE-Mixed). The sum over A is written out: autocast and TF32 do not touch it.
    """
    check_tensor("positions", positions, "[T, A]", dim=2)
    check_tensor("freqs", freqs, "[A, R] or [H, A, R]", dim=(2, 3))
    for name, x in (("positions", positions), ("freqs", freqs)):
        check_dense(name, x)
    check_float("freqs", freqs)
    check_same("positions", positions, "freqs", freqs, dtype=False)
    if positions.is_complex() or positions.shape[1] == 0:
        raise ValueError(
            "positions must be [T, A] of integers or floats, with at least one axis, "
            f"got {tuple(positions.shape)} {positions.dtype}"
        )
    if freqs.shape[-2] != positions.shape[1]:
        raise ValueError(
            f"freqs must be [A, R] or [H, A, R] with A = {positions.shape[1]} to match positions "
            f"{tuple(positions.shape)}, got shape {tuple(freqs.shape)}"
        )
    compute = torch.float64 if freqs.dtype == torch.float64 else torch.float32
    positions, freqs = positions.to(compute), freqs.to(compute)
    if freqs.dim() == 3:
        freqs = freqs.transpose(0, 1)  # [A, H, R]
        positions = positions.unsqueeze(-1)
    angles = sum((positions[:, a, None] * freqs[a] for a in range(positions.shape[1])), start=positions.new_zeros(()))
    return angles.cos(), angles.sin()
