"""How many positions a language model has, by whatever name its configuration calls them, and how many a sample takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_LIMIT = 2**31
"""For models that say none: recurrent ones, and those with distances instead of positions."""

_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "context_length",
    "seq_length",
    "n_ctx",
)


def position_limit(language_model: PreTrainedModel) -> int:
    """Positions that the model was made for. Beyond them a table of learned positions ends with an IndexError, and a rotary
    embedding turns by angles that were never trained, without a word."""
    config = language_model.config.get_text_config()
    limits = (getattr(config, name, None) for name in _NAMES)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), NO_LIMIT)


def count_positions(num_tokens: int, token_grids: Sequence[tuple[int, int, int]]) -> int:
    """Positions that M-RoPE (comp.model.mrope) gives to a row of `num_tokens`: an image takes as many as its longest side."""
    return num_tokens - sum(t * h * w - max(t, h, w) for t, h, w in token_grids)
