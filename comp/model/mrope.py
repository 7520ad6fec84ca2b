"""Multimodal rotary positions (M-RoPE, Qwen2-VL, arXiv 2409.12191) for language models that were built for text only.

Each token has three positions, (time, row, column). Text tokens have three equal ones, so for text the model computes exactly
what it did before; the tokens of an image share their time and carry their row and column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MultimodalRotary(nn.Module):
    """Takes the place of a transformers `rotary_emb` module, whose own forward stays the source of every cos and sin.

    While `position_ids` [3, B, L] is set, the channels of each head are shared out among time, row and column; otherwise the
    module is transparent. The positions come through this attribute and not through the model's `position_ids` argument
    because masks and attention kernels of transformers read that argument as a plain [B, L] running index. That index is looked
    up here: token i of a row has position_ids[:, row, i], and those behind the last one count on, as generated tokens do.
    Rows that are packed into one (`packed`) have a running index that starts again, so their positions are taken as they stand.
    """

    def __init__(self, rotary: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.sections = mrope_sections(head_dim)
        self.position_ids: Tensor | None = None
        self.packed = False

    def forward(self, x: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.position_ids is None:
            return self.rotary(x, position_ids, *args, **kwargs)
        axes = self.position_ids if self.packed else axes_at(self.position_ids, position_ids)
        tables = [self.rotary(x, axis_ids, *args, **kwargs) for axis_ids in axes]
        cos, sin = zip(*tables)
        return self._by_section(cos), self._by_section(sin)

    def _by_section(self, tables: Sequence[Tensor]) -> Tensor:
        """Channels of three [B, L, head_dim] tables: time, row, column of the first half, and again of the second half."""
        parts = [table.split(self.sections * 2, dim=-1) for table in tables]
        return torch.cat([parts[i % 3][i] for i in range(6)], dim=-1)


def axes_at(table: Tensor, index: Tensor) -> Tensor:
    """(time, row, column) of the tokens with this running index [B or 1, n], from `position_ids` [3, B, L]: [3, B, n]."""
    if len(index) > table.shape[1]:  # several beams of every row
        table = table.repeat_interleave(len(index) // table.shape[1], dim=1)
    inside = index.clamp(max=table.shape[2] - 1).expand(table.shape[1], -1)
    return table.gather(2, inside.expand(3, -1, -1)) + (index - inside)


def mrope_sections(head_dim: int) -> list[int]:
    """Channel pairs turned by time, row and column: a quarter, and the rest halved. 128 -> [16, 24, 24], 64 -> [8, 12, 12]."""
    pairs = head_dim // 2
    time = pairs // 4
    row = (pairs - time) // 2
    return [time, row, pairs - time - row]


def install_mrope(decoder: nn.Module) -> MultimodalRotary:
    """Give a decoder (`language_model.base_model`) multimodal rotary positions; twice is the same as once.

    It needs `decoder.rotary_emb(x, position_ids) -> (cos, sin)`, each [B, L, head_dim] with two equal halves, which is what
    Qwen2, Qwen3, Llama, Mistral, SmolLM and their relatives have. Raises ValueError for any other decoder.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    if isinstance(rotary, MultimodalRotary):
        return rotary
    advice = (
        "M-RoPE needs a decoder whose rotary_emb(x, position_ids) returns (cos, sin) with two equal halves; "
        'use position_ids="1d" for this one'
    )
    if rotary is None:
        raise ValueError(f"{type(decoder).__name__} has no rotary_emb: {advice}")
    device = next(decoder.parameters()).device
    try:
        cos, _ = rotary(torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, dtype=torch.long, device=device))
        first, second = cos.chunk(2, dim=-1)
        fits = cos.dim() == 3 and torch.equal(first, second)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{type(decoder).__name__}.rotary_emb cannot be used ({error}): {advice}") from error
    if not fits:
        raise ValueError(f"{type(decoder).__name__}.rotary_emb gives tables {tuple(cos.shape)}: {advice}")
    decoder.rotary_emb = MultimodalRotary(rotary, cos.shape[-1])
    return decoder.rotary_emb


def mrope_position_ids(input_ids: Tensor, token_grids: Sequence[Sequence[tuple[int, int, int]]], image_token_id: int) -> Tensor:
    """(time, row, column) of every token, [3, B, L] int64 on the CPU.

    input_ids:    [B, L] on the CPU; each image is a run of image_token_id.
    token_grids:  per row of input_ids, the grids (t, h, w) of its images counted in merged tokens, in order.
    Text counts up from 0 by one; an image that starts at s has positions s + (frame, row, column); what follows starts at the
    largest position so far plus one.
    """
    position_ids = torch.empty(3, *input_ids.shape, dtype=torch.long)
    for row, (ids, grids) in enumerate(zip(input_ids, token_grids)):
        starts = (ids == image_token_id).nonzero().squeeze(1)
        parts, done, base = [], 0, 0
        for t, h, w in grids:
            run = starts[starts >= done][: t * h * w]
            start = int(run[0])
            if int(run[-1]) - start + 1 != t * h * w:
                raise ValueError(
                    f"the {t * h * w} placeholders of image {(t, h, w)} must follow each other, got {run.tolist()}"
                )
            parts += [torch.arange(base, base + start - done).expand(3, -1)]
            base += start - done
            axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            parts += [torch.stack(axes).flatten(1) + base]
            base += max(t, h, w)
            done = start + t * h * w
        parts += [torch.arange(base, base + len(ids) - done).expand(3, -1)]
        position_ids[:, row] = torch.cat(parts, dim=1)
    return position_ids
