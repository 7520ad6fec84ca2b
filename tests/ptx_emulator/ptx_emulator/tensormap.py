"""Software stand-in for CUtensorMap: a 128-byte descriptor for cp.async.bulk.tensor."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

DTYPES = {
    "u8": (0, 1),
    "u16": (1, 2),
    "u32": (2, 4),
    "s32": (3, 4),
    "u64": (4, 8),
    "s64": (5, 8),
    "f16": (6, 2),
    "f32": (7, 4),
    "f64": (8, 8),
    "bf16": (9, 2),
    "tf32": (11, 4),
}
SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}


class TensorMap:
    """Describes a tiled tensor in global memory, dimension 0 innermost.

    `strides` are in bytes for dimensions 1.., `box` is the tile in elements, `swizzle` is 0, 32, 64 or 128.
    Pass an instance where the kernel takes a CUtensorMap by value, or pass `tm.buffer()` for a pointer.
    """

    def __init__(
        self,
        tensor: Any,
        dtype: str,
        dims: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        element_strides: Sequence[int] | None = None,
        swizzle: int = 0,
        nan_fill: bool = False,
    ):
        self.tensor = tensor
        self.dtype, self.dims, self.strides, self.box = dtype, list(dims), list(strides), list(box)
        self.element_strides = list(element_strides or [1] * len(dims))
        self.swizzle, self.nan_fill = swizzle, nan_fill
        if not 1 <= len(dims) <= 5 or len(box) != len(dims) or len(strides) != len(dims) - 1:
            raise ValueError("rank must be 1..5, with one stride fewer than dimensions")
        if any(s % 16 for s in strides):
            raise ValueError("tensor map strides must be multiples of 16 bytes")
        if any(not 1 <= b <= 256 for b in box):
            raise ValueError("tensor map box dimensions must be 1..256")
        es = DTYPES[dtype][1]
        if box[0] * es % 16:
            raise ValueError("the inner box dimension must be a multiple of 16 bytes")
        if swizzle and box[0] * es > swizzle:
            raise ValueError("the inner box dimension must fit into the swizzle span")

    def encode(self, base: int) -> bytes:
        if base % 16:
            raise ValueError("tensor map base must be 16-byte aligned")
        pad = lambda x, n, v=0: list(x) + [v] * (n - len(x))
        b = struct.pack(
            "<Q4Q5I5I5B7B",
            base,
            *pad(self.strides, 4),
            *pad(self.dims, 5, 1),
            *pad(self.box, 5, 1),
            *pad(self.element_strides, 5, 1),
            len(self.dims) - 1,
            DTYPES[self.dtype][0],
            0,
            SWIZZLE[self.swizzle],
            int(self.nan_fill),
            0,
            0,
        )
        return b.ljust(128, b"\0")
