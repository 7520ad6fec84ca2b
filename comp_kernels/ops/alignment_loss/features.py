"""Feature rows as they are multiplied with prototypes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Rows of vision and text, one below the other; those that do not count are zero."""

    rows: Tensor  # [2 n, terms D], the smallest term first; their sum, times row_scale, has length one where it should
    row_scale: Tensor | None  # [2 n]; None: ones
    inverse_length: Tensor  # [2 n] one over the lengths of the rows as they came; 0: no gradient reaches the row

    @property
    def num_rows(self) -> int:
        """n"""
        return self.rows.shape[0] // 2

    @property
    def text(self) -> Tensor:
        """[n, terms D]"""
        return self.rows[self.num_rows :]

    @property
    def vision(self) -> Tensor:
        """[n, terms D]"""
        return self.rows[: self.num_rows]

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """row_scale of vision and of text"""
        return (None, None) if self.row_scale is None else (self.row_scale[: self.num_rows], self.row_scale[self.num_rows :])
