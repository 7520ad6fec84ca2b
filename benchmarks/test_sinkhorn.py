"""sinkhorn on the CPU against what a user could pick instead, and against the time its bytes and exponentials need.

pytest benchmarks/test_sinkhorn.py --benchmark-only            two minutes on two idle cores
pytest benchmarks/test_sinkhorn.py --benchmark-only --heavy    matrices of up to 1 GiB as well
"""

import statistics
import time

import pytest
import torch

import comp_kernels as ck
from comp_kernels import reference
from comp_kernels.ops.sinkhorn import cpu
from comp_kernels.ops.sinkhorn.call import Call

from .measure import compare
from .peaks import exponential_rate
from .sinkhorn_peers import mhc_loop, ott_solver, peers_of, pot_solver, small_peers_of

EPSILON, NUM_ITERS = 0.05, 3
SHAPES = [(64, 151936), (32, 49152), (2048, 4096), (64, 128, 4096), (8, 256, 16384), (16, 32, 1024)]
HEAVY_SHAPES = [(4, 64, 151936), (64, 64, 16384), (4096, 65536)]
SMALL_SHAPES, SMALL_ITERS = [(8192, 4, 4), (2048, 8, 8), (512, 16, 16), (256, 32, 32)], 20  # hyper-connections: 4 x 4
CACHE_BYTES = 20 << 20  # assumption: an item up to this stays in the last level cache between its iterations


def bytes_moved(shape: tuple[int, ...]) -> int:
    """Scores read, E written, E read once per further iteration, E read and the plan written; within the cache only the scores'
    read and the plan's write are left."""
    item = 4 * shape[-2] * shape[-1]
    passes = 2 if item <= CACHE_BYTES else NUM_ITERS + 3
    return passes * 4 * torch.Size(shape).numel()


def copy_bandwidth(scores: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes per second, read and written, of copying the scores into memory that is there already."""
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(scores)
        seconds.append(time.perf_counter() - start)
    return 2 * scores.nbytes / statistics.median(seconds)


def floor_ms(scores: torch.Tensor, plan: torch.Tensor) -> float:
    """What binds: all bytes at copy bandwidth, or one exponential per element."""
    return 1e3 * max(bytes_moved(scores.shape) / copy_bandwidth(scores, plan), scores.numel() / exponential_rate())


def kernel_and_floor_ms(scores: torch.Tensor) -> tuple[float, float]:
    """Milliseconds into the memory of a result that is there, where `ck.sinkhorn` waits for the system to clear it; and the
    floor in the same memory, measured before and after."""
    flat = scores.reshape(-1, *scores.shape[-2:])
    items, rows, cols = flat.shape
    results = torch.empty_like(flat), torch.zeros(items, rows), torch.zeros(items, cols)
    call = Call(flat, torch.ones(rows), torch.full((cols,), rows / cols), EPSILON, NUM_ITERS, tol=None, group=None)

    def seconds() -> float:
        start = time.perf_counter()
        cpu.solve_into(*results, call)
        return time.perf_counter() - start

    seconds()  # takes the memory from the system, as for a result of its own
    before = floor_ms(flat, results[0])
    kernel = statistics.median(seconds() for _ in range(7)) * 1e3
    return kernel, statistics.mean((before, floor_ms(flat, results[0])))


@pytest.mark.parametrize("shape", SHAPES + [pytest.param(shape, marks=pytest.mark.heavy) for shape in HEAVY_SHAPES], ids=str)
def test_sinkhorn(benchmark, shape):
    scores = torch.rand(shape) * 2 - 1
    few = scores[:1, :8] if scores.dim() == 3 else scores[:8]
    exact = reference.sinkhorn(few.double(), epsilon=EPSILON, num_iters=NUM_ITERS)
    found = ck.sinkhorn(few, epsilon=EPSILON, num_iters=NUM_ITERS)
    peers = peers_of(scores, EPSILON, NUM_ITERS)
    for peer in peers.values():
        peer.check()
    compare(
        benchmark,
        lambda: ck.sinkhorn(scores, epsilon=EPSILON, num_iters=NUM_ITERS),
        {name: peer.call for name, peer in peers.items()},
        group="sinkhorn, 3 iterations",
        case=str(list(shape)),
        error=(found - exact).abs().max().item(),
        peers_compute={name: peer.computes for name, peer in peers.items()},
    )
    info = benchmark.extra_info
    info["kernel_ms"], info["floor_ms"] = kernel_and_floor_ms(scores)
    print(
        f"  {info['ms'] / info['floor_ms']:.2f}x the floor of {info['floor_ms']:.2f} ms; "
        f"into memory that is there: {info['kernel_ms']:.2f} ms, {info['kernel_ms'] / info['floor_ms']:.2f}x"
    )


def small_operations(shape: tuple[int, ...], backward: bool) -> float:
    """Floating-point operations of all iterations, two per instruction and lane: two multiply-adds per entry, four instructions
    for a quotient per row and column. Backwards they run again, and four multiply-adds per entry follow."""
    items, rows, cols = shape
    forward = 2 * rows * cols + 4 * (rows + cols)
    instructions = 2 * forward + 4 * rows * cols if backward else forward
    return 2.0 * items * SMALL_ITERS * instructions


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "gradient"))
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_small_sinkhorn(benchmark, shape, backward):
    """The projection of hyper-connections; the share of the peak is that of the floor in docs/kernels/sinkhorn_small.md."""
    scores, weights = torch.randn(shape), torch.randn(shape)
    leaf = scores.clone().requires_grad_()
    settings = dict(epsilon=1.0, num_iters=SMALL_ITERS, order="rows_cols", eps=1e-6, gradient="unrolled")

    def call(function):
        if not backward:
            return lambda: function(scores)
        return lambda: torch.autograd.grad(function(leaf), leaf, weights)

    def ours(scores):
        return ck.sinkhorn(scores, **settings)

    exact = mhc_loop(scores[:64].double(), SMALL_ITERS)
    peers = {name: call(function) for name, function in small_peers_of(scores, SMALL_ITERS).items()}
    if not backward:  # neither has derivatives of a fixed number of iterations at hand
        others = {"POT": pot_solver(scores, 1.0, SMALL_ITERS), "OTT-JAX": ott_solver(scores, 1.0, SMALL_ITERS)}
        peers |= {name: peer for name, peer in others.items() if peer is not None}
    compare(
        benchmark,
        call(ours),
        peers,
        group=f"sinkhorn of many small matrices, {SMALL_ITERS} iterations, {'forward + backward' if backward else 'forward'}",
        case=str(list(shape)),
        operations=small_operations(shape, backward),
        error=(ours(scores[:64]) - exact).abs().max().item(),
        calls=8,
    )
