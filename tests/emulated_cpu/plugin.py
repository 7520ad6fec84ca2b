"""pytest plugin: the CPU kernels run in another process, for another processor, under an emulator.

    COMP_KERNELS_EMULATED="qemu-aarch64-static build/emulated/aarch64/serve_calls" pytest -p tests.emulated_cpu.plugin ...

csrc/emulate.sh builds and calls all that. The tests are the usual ones, with the usual error budgets: only the compiled
library is replaced, by an object that sends each call to `serve_calls.cpp` and copies the results back.

A call: name (length, bytes), threads, params (size, bytes), buffers (count; each size, flags and, if sent, its bytes),
pointers (count; each offset in params, index of the buffer). The answer: message (length or -1 for null, bytes), and the
buffers that return. Numbers are int64 in the byte order of both processors.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from comp_kernels import _native
from comp_kernels.ops._log_domain.cpu import StepParams
from comp_kernels.ops.alignment_loss import cpu as alignment_loss
from comp_kernels.ops.rope_attention import native as rope_attention
from comp_kernels.ops.sinkhorn.native import SolveParams
from comp_kernels.ops.sinkhorn.small import SmallParams

SENT, RETURNED = 1, 2
STORAGE_BYTES = {0: 4, 1: 8, 2: 2, 3: 2}  # by dtype code of csrc/include
DOUBLE = 8

Extent = tuple[int, int]  # bytes, flags


def strided(element: int, *axes: tuple[int, int]) -> int:
    """Bytes from the first element to the end of the last; axes are (size, stride)."""
    return element * (1 + sum((size - 1) * stride for size, stride in axes)) if all(size for size, _ in axes) else 0


def attention_extents(p: ctypes.Structure, function: str) -> dict[str, Extent]:
    """What each pointer of comp_kernels_rope_attention_params spans."""
    storage, compute = STORAGE_BYTES[p.dtype], 8 if p.dtype == 1 else 4
    queries, keys, channels = (p.num_tokens, p.num_heads), (p.num_tokens_k, p.num_heads_k), (p.head_dim, 1)

    def view(name: str, shape: tuple[int, int]) -> Extent:
        strides = getattr(p, f"{name}_stride_token"), getattr(p, f"{name}_stride_head")
        return strided(storage, *zip(shape, strides), channels), SENT

    table = p.num_tokens * p.table_heads * p.table_width * compute, SENT
    table_k = p.num_tokens_k * p.table_heads_k * p.table_width * compute, SENT
    bounds = (p.num_sequences + 1) * 4, SENT
    rows, rows_k = (tokens * heads * p.head_dim * storage for tokens, heads in (queries, keys))
    gradient, gradient_k = (tokens * heads * p.table_width * compute for tokens, heads in (queries, keys))
    written_by_forward = SENT if function.endswith("backward") else RETURNED
    return {
        "q": view("q", queries),
        "k": view("k", keys),
        "v": view("v", keys),
        "grad_out": view("grad_out", queries),
        **dict.fromkeys(("cos", "sin"), table),
        **dict.fromkeys(("cos_k", "sin_k"), table_k),
        **dict.fromkeys(("cu_seqlens", "cu_seqlens_k"), bounds),
        "out": (rows, written_by_forward),
        "lse": (p.num_tokens * p.num_heads * DOUBLE, written_by_forward),
        "grad_lse": (p.num_tokens * p.num_heads * DOUBLE, SENT),
        "dq": (rows, RETURNED),
        **dict.fromkeys(("dk", "dv"), (rows_k, RETURNED)),
        **dict.fromkeys(("dcos", "dsin"), (gradient, RETURNED)),
        **dict.fromkeys(("dcos_k", "dsin_k"), (gradient_k, RETURNED)),
    }


def sinkhorn_extents(p: ctypes.Structure, function: str) -> dict[str, Extent]:
    """What each pointer of comp_kernels_sinkhorn_params and _step_params spans."""
    storage, compute = STORAGE_BYTES[p.dtype], 8 if p.dtype == 1 else 4
    rows, cols = p.num_rows * compute, p.num_cols * compute
    matrix = (p.num_rows, p.row_stride), (p.num_cols, 1)
    if function.endswith("solve"):
        return {
            "scores": (strided(storage, (p.num_items, p.item_stride), *matrix), SENT),
            "row_marginals": (strided(compute, (p.num_items, p.row_marginals_stride), (p.num_rows, 1)), SENT),
            "col_marginals": (strided(compute, (p.num_items, p.col_marginals_stride), (p.num_cols, 1)), SENT),
            "u": (p.num_items * rows, RETURNED),
            "v": (p.num_items * cols, RETURNED),
            "plan": (p.num_items * rows * p.num_cols, RETURNED),
        }
    statistics = cols if function.endswith("column_statistics") else rows
    return {
        "scores": (strided(storage, *matrix), SENT),
        **dict.fromkeys(("col_scale", "col_marginals", "v2"), (cols, SENT)),
        "u2": (rows, SENT),
        "v2_new": (cols, RETURNED),
        "row_sums": (p.num_rows * DOUBLE, SENT | RETURNED),
        "largest_weight": (compute, SENT | RETURNED),
        **dict.fromkeys(("peaks", "sums"), (statistics, SENT | RETURNED)),
        "plan": (rows * p.num_cols, RETURNED),
    }


def small_sinkhorn_extents(p: ctypes.Structure, function: str) -> dict[str, Extent]:
    """What each pointer of comp_kernels_sinkhorn_small_params spans."""
    storage, compute = STORAGE_BYTES[p.dtype], 8 if p.dtype == 1 else 4
    entries, u, v = (p.num_items * count for count in (p.num_rows * p.num_cols, p.num_rows, p.num_cols))
    return {
        "scores": (strided(storage, (p.num_items, p.item_stride), (p.num_rows, p.num_cols), (p.num_cols, 1)), SENT),
        "row_marginals": (strided(compute, (p.num_items, p.row_marginals_stride), (p.num_rows, 1)), SENT),
        "col_marginals": (strided(compute, (p.num_items, p.col_marginals_stride), (p.num_cols, 1)), SENT),
        **{name: (count * compute, RETURNED) for name, count in (("u", u), ("v", v), ("plan", entries))},
        **{f"grad_{name}": (count * compute, SENT) for name, count in (("u", u), ("v", v), ("plan", entries))},
        "grad_scores": (entries * storage, RETURNED),
    }


def alignment_extents(p: ctypes.Structure, function: str) -> dict[str, Extent]:
    """What each pointer of comp_kernels_alignment_loss_params spans."""
    compute = 8 if p.dtype == 1 else 4
    rows, cols = p.num_rows * compute, p.num_cols * compute
    return {
        "text": (strided(compute, (p.num_rows, p.text_stride), (p.num_cols, 1)), SENT),
        "vision": (strided(compute, (p.num_rows, p.vision_stride), (p.num_cols, 1)), SENT | RETURNED),
        **dict.fromkeys(("col_scale", "v2"), (cols, SENT)),
        **dict.fromkeys(("u2", "target_weight", "peaks2", "sums", "row_weight"), (rows, SENT)),
        "row_loss2": (p.num_rows * DOUBLE, SENT | RETURNED),
    }


OPERATORS: dict[str, tuple[type[ctypes.Structure], Callable[[Any, str], dict[str, Extent]]]] = {
    "comp_kernels_cpu_rope_attention": (rope_attention.Params, attention_extents),
    "comp_kernels_cpu_sinkhorn_small": (SmallParams, small_sinkhorn_extents),
    "comp_kernels_cpu_sinkhorn_solve": (SolveParams, sinkhorn_extents),
    "comp_kernels_cpu_sinkhorn": (StepParams, sinkhorn_extents),
    "comp_kernels_cpu_alignment_loss": (alignment_loss.Params, alignment_extents),
}
"""What functions whose names begin so are given, and what its pointers span."""


class EmulatedLibrary:
    """Stands for the ctypes library: its attributes, or items, are functions that run in the emulator."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name: str) -> Callable:
        def function(params: Any = None) -> bytes | None:
            return self.call(name, params if params is None or isinstance(params, bytes) else bytes(params._obj))

        setattr(self, name, function)
        return function

    __getitem__ = __getattr__

    def call(self, name: str, packed: bytes | None) -> bytes | None:
        params, extents = None, {}
        if packed is not None:
            kind, spans = next(operator for prefix, operator in OPERATORS.items() if name.startswith(prefix))
            params = kind.from_buffer_copy(packed)
            extents = spans(params, name)
        buffers: dict[int, list[int]] = {}  # address -> [bytes, flags]; pointers to the same memory share a buffer
        pointers: list[tuple[int, int]] = []  # (offset in params, address)
        for field, (size, flags) in extents.items():
            address = getattr(params, field)
            if address is not None:
                known = buffers.setdefault(address, [size, 0])
                known[0], known[1] = max(known[0], size), known[1] | flags
                pointers.append((getattr(type(params), field).offset, address))
        index = {address: i for i, address in enumerate(buffers)}

        self.send(len(name), name.encode(), torch.get_num_threads())
        self.send(len(packed or b""), packed or b"", len(buffers))
        for address, (size, flags) in buffers.items():
            self.send(size, flags, ctypes.string_at(address, size) if flags & SENT else b"")
        self.send(len(pointers), *(number for offset, address in pointers for number in (offset, index[address])))
        self.process.stdin.flush()

        (length,) = struct.unpack("=q", self.receive(8))
        message = None if length < 0 else self.receive(length)
        for address, (size, flags) in buffers.items():
            if flags & RETURNED:
                ctypes.memmove(address, self.receive(size), size)
        return message

    def send(self, *parts: int | bytes) -> None:
        for part in parts:
            self.process.stdin.write(struct.pack("=q", part) if isinstance(part, int) else part)

    def receive(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        if len(data) < size:
            raise RuntimeError(f"the emulated kernel ended: exit status {self.process.wait()}")
        return data


def pytest_configure(config) -> None:
    library = EmulatedLibrary(shlex.split(os.environ["COMP_KERNELS_EMULATED"]))
    _native._cpu = lambda: library
    config.emulated_isa = library.comp_kernels_cpu_isa().decode()


def pytest_report_header(config) -> str:
    return f"CPU kernels: emulated, instruction set {config.emulated_isa}"
