"""sinkhorn on the CPU against what a user could pick instead, and against the time its bytes need."""

import statistics
import time

import pytest
import torch

import comp_kernels as ck
from comp_kernels import reference

from .measure import compare
from .sinkhorn_peers import peers_of

EPSILON, NUM_ITERS = 0.05, 3
SHAPES = [(64, 151936), (32, 49152), (2048, 4096), (64, 128, 4096), (16, 32, 1024)]


def copy_bandwidth(scores: torch.Tensor) -> float:
    """Bytes per second, read and written, of copying the scores into memory that is there already."""
    target, seconds = torch.empty_like(scores), []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(scores)
        seconds.append(time.perf_counter() - start)
    return 2 * scores.nbytes / statistics.median(seconds)


def bytes_moved(shape: tuple[int, ...]) -> int:
    """One read per iteration and one for the plan, which is written; items that stay in the cache are read once."""
    elements = torch.Size(shape).numel()
    reads = 1 if len(shape) == 3 else NUM_ITERS + 1
    return 4 * elements * (reads + 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sinkhorn(benchmark, shape):
    scores = torch.rand(shape) * 2 - 1
    exact = reference.sinkhorn(scores[..., :8, :].double(), epsilon=EPSILON, num_iters=NUM_ITERS)
    found = ck.sinkhorn(scores[..., :8, :], epsilon=EPSILON, num_iters=NUM_ITERS)
    floor = bytes_moved(shape) / copy_bandwidth(scores) * 1e3
    compare(
        benchmark,
        lambda: ck.sinkhorn(scores, epsilon=EPSILON, num_iters=NUM_ITERS),
        peers_of(scores, EPSILON, NUM_ITERS),
        group="sinkhorn, 3 iterations",
        case=str(list(shape)),
        error=(found - exact).abs().max().item(),
        floor_ms=floor,
    )
    after = bytes_moved(shape) / copy_bandwidth(scores) * 1e3
    print(f"  {benchmark.extra_info['ms'] / statistics.mean((floor, after)):.2f}x the time of its bytes at copy bandwidth")
