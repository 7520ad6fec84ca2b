"""Products of features with tiles of prototypes, all through torch's matmul: a well-kept BLAS beats kernels of ours here.

    Matmul      the computing dtype; torch.mm follows torch.set_float32_matmul_precision and allow_tf32, float32 is exact by
                default. Prototypes of another dtype are widened tile by tile.
    OneDnn      the same on AMD's processors with AVX-512, where torch's oneDNN is faster than the BLAS of torch.mm
    Half        16-bit prototypes on a GPU: 16-bit products with float32 results, no widened prototypes at all

Features are kept as `terms` numbers whose sum they are: one in the computing dtype, one of 16 bits as the user gave it (with a
float32 factor per row), or up to three of bfloat16, which together hold the 24 bits of a float32. Terms lie side by side along
the channels, the smallest first, so one product with prototypes that are repeated as often adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._processor import is_intel

COLUMNS = 16  # tiles of prototypes begin at multiples of it, whatever the batch: 64 bytes of a row of scores in float32

# Channels per product in oneDNN: it adds up all of them in one register, and in parts of this size its error is the BLAS's
# (docs/kernels/alignment_loss.md).
ONEDNN_CHANNELS = 320
ONEDNN_OPERATIONS = 1 << 20  # below, a call costs more than the product

# Elements of prototypes that are widened at a time: on CPUs they stay in the caches, on GPUs fewer tiles mean fewer launches.
WIDE_ELEMENTS = {"cpu": 1 << 20, "cuda": 3 << 24}

# Bytes of repeated prototypes, and of the terms of score gradients; fewer of the first for many rows.
REPEATED_BYTES, GRADIENT_BYTES = 200 << 20, 226 << 20
MANY_ROWS, REPEATED_BYTES_OF_MANY = 2048, 48 << 20


def bfloat16_terms() -> int:
    """Terms of a float32 by the precision that its products are to have: 24, 16 or 8 bits."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user set torch.backends.*.fp32_precision (torch 2.9), which has no word for 8 bits on a GPU
        precision = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    return {"highest": 3, "high": 2, "medium": 1}[precision]


def cut(begin: int, end: int, width: int | None) -> list[slice]:
    """Columns begin to end in pieces of that width; None: in one."""
    width = max(end - begin if width is None else width, 1)
    return [slice(start, min(start + width, end)) for start in range(begin, end, width)]


class Matmul:
    """torch.mm in the computing dtype, for so many rows of vision and as many of text."""

    def __init__(self, prototypes: Tensor, rows: int, dtype: torch.dtype) -> None:
        self.prototypes, self.rows, self.dtype = prototypes, rows, dtype
        self.row_dtype, self.terms = dtype, 1  # of the features
        self.gradient_dtype, self.gradient_terms = dtype, 1  # of the score gradients
        self.raw = False  # whether features are as the user gave them, with a factor per row
        self.wide = prototypes.dtype == dtype
        self.memory: Tensor | None = None
        self.widened: tuple[slice, Tensor] | None = None  # the columns that are in this memory at present

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that is used again by the next call."""
        self.widened = None
        size = math.prod(shape) * dtype.itemsize
        if self.memory is None or self.memory.numel() < size:
            self.memory = None
            self.memory = self.prototypes.new_empty(size, dtype=torch.uint8)
        return self.memory[:size].view(dtype).view(shape)

    def gradient_cols(self) -> int | None:
        """Columns of a tile of score gradients at most; None: any number."""
        return None

    def extra_elements(self, cols: int) -> int:
        """Memory beside the scores for tiles of `cols`, in elements of the computing dtype."""
        return min(cols, self.wide_cols() or 0) * self.prototypes.shape[1]

    def wide_cols(self) -> int | None:
        """Columns that are widened at a time; None: none are."""
        if self.wide:
            return None
        elements = WIDE_ELEMENTS.get(self.prototypes.device.type, WIDE_ELEMENTS["cuda"])
        return max(elements // max(self.prototypes.shape[1], 1) // COLUMNS * COLUMNS, 256)

    def tile(self, columns: slice) -> Tensor:
        """Prototypes [C, D] in the computing dtype."""
        rows = self.prototypes[columns]
        if self.wide:
            return rows
        if self.widened is None or self.widened[0] != columns:
            self.widened = columns, self.scratch(tuple(rows.shape), self.dtype).copy_(rows)
        return self.widened[1]

    def scores(self, features: Tensor, columns: slice, out: Tensor) -> None:
        """out [m, C] = features [m, terms D] @ prototypes^T, summed over the terms."""
        for part in cut(columns.start, columns.stop, self.wide_cols()):
            torch.mm(features, self.tile(part).T, out=out[:, part.start - columns.start : part.stop - columns.start])

    def score_gradients(self, scores: Tensor) -> Tensor:
        """[terms, n, C]: where the gradient of a tile of scores goes; here over the scores themselves."""
        return scores.unsqueeze(0)

    def add_gradient(self, score_gradients: Tensor, columns: slice, out: Tensor, first: bool) -> None:
        """out [terms, n, D] (+)= score_gradients [terms, n, C] @ prototypes."""
        # From the end: what the scores of these columns widened last may still be there.
        for part in reversed(cut(columns.start, columns.stop, self.wide_cols())):
            of_part = score_gradients[0, :, part.start - columns.start : part.stop - columns.start]
            if first and part.stop == columns.stop:
                torch.mm(of_part, self.tile(part), out=out[0])
            else:
                out[0].addmm_(of_part, self.tile(part))

    def prototype_gradient(self, score_gradients: Tensor, features: Tensor, out: Tensor) -> None:
        """out [C, D] = score_gradients [1, n, C]^T @ features [n, D]."""
        torch.mm(score_gradients[0].T, features, out=out)


class OneDnn(Matmul):
    """float32 through torch's oneDNN, which takes weights without gaps between rows and returns fresh memory."""

    def __init__(self, prototypes: Tensor, rows: int, dtype: torch.dtype) -> None:
        super().__init__(prototypes, rows, dtype)
        self.parts: list[Tensor] = []  # of a tile, by channels

    def scores(self, features: Tensor, columns: slice, out: Tensor) -> None:
        if out.numel() * features.shape[1] < ONEDNN_OPERATIONS:
            super().scores(features, columns, out)
            return
        parts = self.channel_parts(columns)
        begin, part = next(parts)
        found = _linear(features[:, begin : begin + part.shape[1]], part)
        for begin, part in parts:
            found = _linear_plus(features[:, begin : begin + part.shape[1]], part, found)
        out.copy_(found)

    def extra_elements(self, cols: int) -> int:
        return super().extra_elements(cols) + cols * (self.prototypes.shape[1] + self.rows)

    def channel_parts(self, columns: slice) -> Iterator[tuple[int, Tensor]]:
        """(first channel, prototypes [C, channels] without gaps) for each part of the channels."""
        rows = self.prototypes[columns]
        cols, dim = rows.shape
        number = -(-dim // ONEDNN_CHANNELS)
        if number == 1 and self.wide and rows.is_contiguous():
            yield 0, rows
            return
        width = -(-dim // number // 16) * 16
        if not self.parts or self.parts[0].shape[0] < cols:
            self.parts = [rows.new_empty((cols, min(width, dim - k)), dtype=self.dtype) for k in range(0, dim, width)]
        for begin, part in zip(range(0, dim, width), self.parts):
            yield begin, part[:cols].copy_(rows[:, begin : begin + width])

    def add_gradient(self, score_gradients: Tensor, columns: slice, out: Tensor, first: bool) -> None:
        tile = self.tile(columns)
        if score_gradients.numel() * tile.shape[1] < ONEDNN_OPERATIONS or not tile.is_contiguous():
            super().add_gradient(score_gradients, columns, out, first)
            return
        product = _linear(score_gradients[0], tile.T)
        if first:
            out[0].copy_(product)
        else:
            out[0].add_(product)

    def prototype_gradient(self, score_gradients: Tensor, features: Tensor, out: Tensor) -> None:
        if out.numel() * features.shape[0] < ONEDNN_OPERATIONS or not features.is_contiguous():
            super().prototype_gradient(score_gradients, features, out)
            return
        out.copy_(_linear(score_gradients[0].T, features.T))


class Half(Matmul):
    """16-bit operands, float32 results."""

    def __init__(self, prototypes: Tensor, rows: int, dtype: torch.dtype, features_dtype: torch.dtype) -> None:
        super().__init__(prototypes, rows, dtype)
        self.row_dtype = prototypes.dtype
        self.raw = features_dtype == prototypes.dtype
        self.terms = 1 if self.raw else bfloat16_terms()
        self.repeated_bytes = REPEATED_BYTES if rows < MANY_ROWS else REPEATED_BYTES_OF_MANY
        # float16 has not the range of score gradients: there the last product takes widened tiles.
        self.half_gradients = prototypes.dtype == torch.bfloat16
        if self.half_gradients:
            self.gradient_dtype, self.gradient_terms = torch.bfloat16, self.terms

    def gradient_cols(self) -> int | None:
        return self.columns_in(GRADIENT_BYTES, self.gradient_terms * self.rows * 2) if self.half_gradients else None

    def repeated_cols(self) -> int | None:
        """Columns whose prototypes are repeated for the terms at a time; None: none are."""
        return self.columns_in(self.repeated_bytes, self.terms * self.prototypes.shape[1] * 2) if self.terms > 1 else None

    def columns_in(self, size: int, bytes_per_column: int) -> int:
        """In equal parts of the prototypes."""
        cols = max(size // max(bytes_per_column, 1), 512)
        parts = max(-(-self.prototypes.shape[0] // cols), 1)
        return -(-self.prototypes.shape[0] // parts // COLUMNS) * COLUMNS

    def extra_elements(self, cols: int) -> int:
        repeated = 0 if self.terms == 1 else min(self.repeated_bytes, self.terms * cols * self.prototypes.shape[1] * 2)
        gradients = min(GRADIENT_BYTES, self.gradient_terms * self.rows * cols * 2)
        return max(repeated, gradients) // 4

    def scores(self, features: Tensor, columns: slice, out: Tensor) -> None:
        for part in cut(columns.start, columns.stop, self.repeated_cols()):
            tile = self.prototypes[part]
            if self.terms > 1:
                cols, dim = tile.shape
                tile = self.scratch((cols, self.terms, dim), tile.dtype).copy_(tile.unsqueeze(1)).view(cols, -1)
            _wide_mm(features, tile.T, out[:, part.start - columns.start : part.stop - columns.start])

    def score_gradients(self, scores: Tensor) -> Tensor:
        if not self.half_gradients:
            return super().score_gradients(scores)
        return self.scratch((self.gradient_terms, *scores.shape), self.gradient_dtype)

    def add_gradient(self, score_gradients: Tensor, columns: slice, out: Tensor, first: bool) -> None:
        if not self.half_gradients:
            super().add_gradient(score_gradients, columns, out, first)
            return
        product = out if first else torch.empty_like(out)
        _wide_mm(score_gradients.flatten(0, 1), self.prototypes[columns], product.flatten(0, 1))
        if not first:
            out += product


def choose_products(
    prototypes: Tensor, rows: int, dtype: torch.dtype, features_dtype: torch.dtype, prototype_gradient: bool, on_gpu: bool
) -> Matmul:
    """The products of `rows` rows of vision and of text, of `features_dtype`, with prototypes, computing in `dtype`."""
    if not on_gpu:
        return (OneDnn if dtype == torch.float32 and onednn_is_faster() else Matmul)(prototypes, rows, dtype)
    half = prototypes.dtype == torch.bfloat16 or prototypes.dtype == features_dtype == torch.float16
    if dtype == torch.float32 and half and not prototype_gradient:
        return Half(prototypes, rows, dtype, features_dtype)
    return Matmul(prototypes, rows, dtype)


def onednn_is_faster() -> bool:
    """Whether torch has oneDNN and the processor has AVX-512, which the BLAS of torch.mm, Intel's, takes on Intel's alone."""
    mkldnn = torch.backends.mkldnn
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return avx512 and not is_intel() and mkldnn.is_available() and bool(mkldnn.enabled)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def _linear_plus(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add")


def _wide_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out float32 = a @ b with 16-bit operands. torch has it for GPUs; elsewhere, in tests, the operands are widened."""
    if a.device.type == "cpu":
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
