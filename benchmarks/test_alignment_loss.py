"""alignment_loss on the CPU, forward and backward, against eager and compiled versions of the same mathematics."""

import pytest
import torch

import comp_kernels as ck
from comp_kernels import reference

from .measure import compare, peak_memory

# (rows, prototypes, dim): language models of 0.1, 0.5 and 7 billion parameters
SIZES = [(32, 49152, 576), (256, 49152, 576), (32, 151936, 896), (256, 151936, 896)]


def make_inputs(rows: int, words: int, dim: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    prototypes = torch.randn(words, dim)
    vision, text = (torch.randn(rows, dim) + prototypes[:rows] for _ in range(2))
    return (vision.requires_grad_(), text, prototypes), torch.randint(0, 1000, (words,))


def step(function, inputs, prior, **settings):
    def run():
        return torch.autograd.grad(function(*inputs, prior=prior, mode="sinkhorn", **settings), inputs[0])[0]

    return run


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_alignment_loss(benchmark, size):
    rows, words, dim = size
    inputs, prior = make_inputs(*size)
    eager = step(reference.alignment_loss, inputs, prior)
    peers = {"eager": eager, "compiled": step(torch.compile(reference.alignment_loss, dynamic=False), inputs, prior)}
    ours = step(ck.alignment_loss, inputs, prior)
    compare(
        benchmark,
        ours,
        peers,
        group="alignment_loss sinkhorn, forward+backward",
        case=f"n={rows} V={words} D={dim}",
        operations=3 * 2.0 * rows * words * dim,
        difference=(ours() - eager()).abs().max().item() / eager().abs().max().item(),
        rounds=3,
    )


def test_large_batch(benchmark):
    """Where the eager version needs more than 8 GiB: ours alone."""
    inputs, prior = make_inputs(2048, 151936, 896)
    ours = step(ck.alignment_loss, inputs, prior)
    memory = peak_memory(ours)
    benchmark.pedantic(ours, rounds=1)
    print(f"\nn=2048 V=151936 D=896: {benchmark.stats.stats.median:.1f} s, {memory:.0f} MiB of extra memory")
