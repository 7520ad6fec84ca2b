"""Launch configurations of the Triton kernels of rope_attention: a table per architecture, or measured on the spot.

Set COMP_KERNELS_AUTOTUNE=1 to measure: the first call for each (kernel, architecture, head dim, dtype) then times the
candidates that fit the chip on its own arguments and keeps the fastest for the life of the process. This waits for the
device; nothing else in this backend does.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

AUTOTUNE_VARIABLE = "COMP_KERNELS_AUTOTUNE"

# Keys are rotated in the forward loop, instead of once in a workspace, when sequences are this short on average: one query
# tile then covers a sequence, so no key is rotated twice (README.md has the arithmetic).
INLINE_LENGTH = 64
INLINE_HEAD_DIM = 96  # beyond, a key tile, its partners and its tables do not fit the registers beside the rest of the loop
QUERY_HEAD_DIM = 128  # beyond, the same holds for the query tile: queries are rotated into a workspace as well


class TileConfig(NamedTuple):
    block_m: int  # query rows per tile
    block_n: int  # key rows per tile
    num_warps: int
    num_stages: int  # copies in flight of the tiles that the loop loads
    num_passes: int = 1  # key_value_gradient: 2 computes dv, then dk, with half of the accumulators and five products for four


# 16-bit dtypes; per kernel and family, up to which head dim (rounded up to 16) a configuration serves. Chosen with Triton 3.9.0
# so that with half-width tables nothing spills on sm_80 and sm_90: forward at no head dim, backward up to 80 (sm_80) and 128
# (sm_90). docs/compile_report.md has what does spill, and what other versions of Triton make of it.
TABLE: dict[str, dict[str, dict[int, TileConfig]]] = {
    "forward": {
        "sm_80": {
            64: TileConfig(128, 64, 4, 2),
            80: TileConfig(128, 128, 8, 2),
            128: TileConfig(128, 64, 8, 2),
            256: TileConfig(64, 16, 4, 2),
        },
        "sm_90": {80: TileConfig(128, 128, 8, 2), 128: TileConfig(128, 64, 8, 2), 256: TileConfig(128, 32, 8, 2)},
        "gfx9": {128: TileConfig(128, 64, 4, 1), 256: TileConfig(64, 32, 4, 1)},
    },
    "inline": {  # up to INLINE_HEAD_DIM
        "sm_80": {96: TileConfig(64, 64, 4, 1)},
        "sm_90": {64: TileConfig(64, 64, 4, 1), 96: TileConfig(64, 32, 4, 1)},
        "gfx9": {96: TileConfig(64, 64, 4, 1)},
    },
    "query_gradient": {
        "sm_80": {
            64: TileConfig(64, 64, 4, 2),
            96: TileConfig(64, 32, 4, 2),
            128: TileConfig(128, 32, 8, 2),
            256: TileConfig(64, 16, 4, 2),
        },
        "sm_90": {128: TileConfig(64, 64, 4, 2), 256: TileConfig(64, 32, 4, 2)},
        "gfx9": {128: TileConfig(64, 64, 4, 1), 256: TileConfig(64, 32, 4, 1)},
    },
    "key_value_gradient": {
        "sm_80": {96: TileConfig(32, 64, 4, 2), 128: TileConfig(64, 64, 8, 2), 256: TileConfig(32, 32, 4, 2, 2)},
        "sm_90": {128: TileConfig(64, 64, 8, 2), 256: TileConfig(32, 64, 8, 1)},
        "gfx9": {128: TileConfig(64, 64, 4, 1), 256: TileConfig(32, 64, 8, 1)},
    },
}
# float32. On NVIDIA a warp owns 16 rows: with more, three products per product leave no registers. The row sm_86 is for chips
# with 99 KiB of shared memory per block, and for sm_100, whose matrix units take operands from a memory of their own: filling
# that in 32 bits costs registers, and two warps get the instructions of sm_80 instead.
FLOAT32: dict[str, dict[str, dict[int, TileConfig]]] = {
    "forward": {
        "sm_80": {256: TileConfig(32, 16, 2, 2)},
        "sm_86": {256: TileConfig(32, 16, 2, 2)},
        "sm_90": {128: TileConfig(64, 32, 4, 2), 256: TileConfig(32, 16, 2, 2)},
        "gfx9": {128: TileConfig(64, 32, 4, 2), 256: TileConfig(32, 32, 4, 1)},
    },
    "query_gradient": {
        "sm_80": {128: TileConfig(32, 16, 2, 2), 256: TileConfig(16, 16, 1, 2)},
        "sm_86": {128: TileConfig(32, 16, 2, 2), 256: TileConfig(16, 16, 1, 1)},
        "sm_90": {128: TileConfig(64, 16, 4, 2), 256: TileConfig(16, 16, 1, 2)},
        "gfx9": {128: TileConfig(64, 32, 4, 2), 256: TileConfig(32, 32, 4, 1)},
    },
    "key_value_gradient": {
        "sm_80": {128: TileConfig(16, 32, 2, 2), 256: TileConfig(16, 16, 1, 2, 2)},
        "sm_86": {96: TileConfig(16, 32, 2, 2), 128: TileConfig(16, 32, 2, 2, 2), 256: TileConfig(16, 16, 1, 1, 2)},
        "sm_90": {96: TileConfig(16, 64, 4, 2), 128: TileConfig(16, 64, 4, 2, 2), 256: TileConfig(16, 16, 1, 2, 2)},
        "gfx9": {128: TileConfig(32, 64, 4, 1), 256: TileConfig(32, 32, 4, 1)},
    },
}
INTERPRETED = TileConfig(64, 32, 4, 1)


def family(arch: str, dtype: torch.dtype) -> str:
    """The row for an architecture: "sm_89" -> "sm_80", "sm_100" -> "sm_90" (float32: both "sm_86"), "gfx942" -> "gfx9"."""
    if not arch.startswith("sm_"):
        return "gfx9"
    if dtype == torch.float32:
        return arch if arch in ("sm_80", "sm_90") else "sm_86"
    return "sm_90" if int(arch[3:]) in range(90, 120) else "sm_80"  # sm_120 has the shared memory and mma of sm_80


def table_config(kernel: str, arch: str, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """The configuration of `kernel` ("forward", "inline", "query_gradient" or "key_value_gradient") without measuring."""
    return INTERPRETED if arch == "interpreter" else _table_config(kernel, arch, head_dim, dtype, triton_release())


@functools.cache
def _table_config(kernel: str, arch: str, head_dim: int, dtype: torch.dtype, release: str) -> TileConfig:
    if dtype == torch.float32:
        table = FLOAT32["forward" if kernel == "inline" else kernel]
    else:
        table = TABLE[kernel]
    padded = -(-head_dim // 16) * 16
    config = next(config for limit, config in table[family(arch, dtype)].items() if padded <= limit)
    if dtype == torch.float32 and padded <= 128 and family(arch, dtype) in ("sm_80", "sm_86") and release == "3.8":
        return config._replace(**TRITON_3_8.get(kernel, {}))
    return config


# Triton 3.8, and no other version, spills in the loops of the float32 backward with mma.sync: on sm_80 at D = 72 162 of 1,904
# instructions of dk and dv, 24 of 1,244 of dq. So: none in both.
TRITON_3_8 = {"key_value_gradient": dict(num_passes=2), "query_gradient": dict(num_stages=1)}


@functools.cache
def triton_release() -> str:
    """Major and minor version of the Triton that compiles: "3.9"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def widest_chunk(head_dim: int, precision: str) -> int:
    """Channels that one product takes at a time: what it holds beside its operands, or a rotation, must fit the registers."""
    if precision == "tf32x3":
        return 32
    return 128 if head_dim <= 128 else 64


def rotate_keys_inline(num_tokens: int, num_sequences: int, group: int, head_dim: int) -> bool:
    """Whether the forward kernel rotates keys while it loads them; decided from sizes that the host knows."""
    return group == 1 and head_dim <= INLINE_HEAD_DIM and num_tokens <= INLINE_LENGTH * num_sequences


def rotate_queries_inline(head_dim: int) -> bool:
    """Whether the forward kernel rotates queries while it loads them."""
    return head_dim <= QUERY_HEAD_DIM


# --- autotuning ------------------------------------------------------------------------------------------------------------

_measured: dict[tuple, TileConfig] = {}


def fits(kernel: str, config: TileConfig, head_dim: int, itemsize: int, shared_limit: int) -> bool:
    """Whether the tiles of a configuration can live on chip: shared memory in bytes, accumulators in registers."""
    padded = -(-head_dim // 16) * 16
    m, n = config.block_m, config.block_n
    if kernel == "key_value_gradient":
        accumulators, resident, streamed = 2 // config.num_passes * n * padded + 2 * m * n, 2 * n, 2 * m
    elif kernel == "query_gradient":
        accumulators, resident, streamed = m * padded + 2 * m * n, 2 * m, 2 * n
    else:
        accumulators, resident, streamed = m * padded + m * n, m, 2 * n
    if itemsize == 4:  # resident tiles as high and low halves; tiles used both ways are loaded twice
        resident, streamed = 2 * resident, {"key_value_gradient": 4 * m, "query_gradient": 3 * n}.get(kernel, streamed)
    shared = (resident + streamed * config.num_stages) * padded * itemsize
    return shared <= shared_limit and accumulators <= 192 * 32 * config.num_warps


def candidates(kernel: str, head_dim: int, itemsize: int, shared_limit: int) -> list[TileConfig]:
    for_keys = kernel == "key_value_gradient"
    passes = (1, 2) if for_keys else (1,)
    every: Iterable[tuple[int, int, int]]  # rows, columns, warps
    if itemsize == 4:  # 16 rows per warp of the tile that a program owns
        sizes = [(16 * warps, streamed, warps) for warps in (1, 2, 4) for streamed in (16, 32)]
        every = [(n, m, w) if for_keys else (m, n, w) for m, n, w in sizes]
    else:
        every = itertools.product((64, 128), (32, 64, 128), (4, 8))
    stages = (1, 2) if itemsize == 4 else (1, 2, 3)
    configs = [TileConfig(*tile, s, p) for tile in every for s in stages for p in passes]
    return [config for config in configs if fits(kernel, config, head_dim, itemsize, shared_limit)]


def choose_config(
    kernel: str, arch: str, head_dim: int, dtype: torch.dtype, device: torch.device, run: Callable[[TileConfig], object]
) -> TileConfig:
    """The table's configuration, or the fastest one for `run(config)` when autotuning is on and there is a device to time."""
    default = table_config(kernel, arch, head_dim, dtype)
    if device.type != "cuda" or os.environ.get(AUTOTUNE_VARIABLE) != "1":
        return default
    key = (kernel, arch, head_dim, dtype)
    if key not in _measured:
        properties = torch.cuda.get_device_properties(device)
        shared_limit = max(properties.shared_memory_per_block, getattr(properties, "shared_memory_per_block_optin", 0))
        _measured[key] = fastest([default, *candidates(kernel, head_dim, dtype.itemsize, shared_limit)], run, time_on_device)
    return _measured[key]


def fastest(configs: list[TileConfig], run: Callable[[TileConfig], object], time: Callable[[Callable], float]) -> TileConfig:
    """The configuration with the smallest time(run); those that the chip refuses after all are left out."""
    from triton.runtime.errors import OutOfResources

    times = {}
    for config in configs:
        try:
            times[config] = time(lambda config=config: run(config))
        except OutOfResources:
            continue
    return min(times, key=times.__getitem__)


def time_on_device(function: Callable) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=5, rep=20, return_mode="median")
