"""What probes of frozen towers share: batches of indices, and how often a held-out set is drawn anew for an error."""

from __future__ import annotations

from collections.abc import Iterator

RESAMPLES = 1000
"""Draws with repetition of a held-out set, behind a standard error."""


def in_batches(count: int, size: int) -> Iterator[range]:
    """The indices 0 .. count - 1, `size` at a time."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))
