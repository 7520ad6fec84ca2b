"""alignment_loss on the CPU, forward and backward, against eager and compiled versions of the same mathematics.

pytest benchmarks/test_alignment_loss.py --benchmark-only            four minutes on two idle cores, 6 GiB
pytest benchmarks/test_alignment_loss.py --benchmark-only --heavy    models of seven billion parameters, and eager at n = 2048
"""

import pytest
import torch

import comp_kernels as ck
from comp_kernels import reference

from .alignment_peers import liger
from .measure import available_gib, compare, peak_memory

# (rows, prototypes, dim): language models of 0.1, 0.5 and 7 billion parameters
SIZES = [(32, 49152, 576), (256, 49152, 576), (32, 151936, 896), (256, 151936, 896), (32, 151936, 3584)]
HEAVY_SIZES = [(2048, 49152, 576), (256, 151936, 3584)]
ROWS_IN_FLOAT64 = 8


def make_inputs(rows: int, words: int, dim: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    prototypes = torch.randn(words, dim)
    vision, text = (torch.randn(rows, dim) + prototypes[:rows] for _ in range(2))
    return (vision.requires_grad_(), text, prototypes), torch.randint(0, 1000, (words,))


def step(function, inputs, prior):
    def run():
        return torch.autograd.grad(function(*inputs, prior=prior, mode="sinkhorn"), inputs[0])[0]

    return run


def errors(inputs, prior) -> dict[str, float]:
    """Largest error of the gradient of a few rows, in units of its largest value, against float64; nothing where the float64
    prototypes would take more than 2 GiB."""
    if inputs[2].nbytes > 1 << 30:
        return {}
    few = [x.detach()[:ROWS_IN_FLOAT64].requires_grad_() if x is not inputs[2] else x for x in inputs]
    exact = step(reference.alignment_loss, [x.detach().double().requires_grad_(x.requires_grad) for x in few], prior)()
    found = {"error": step(ck.alignment_loss, few, prior)(), "eager_error": step(reference.alignment_loss, few, prior)()}
    return {name: ((x - exact).abs().max() / exact.abs().max()).item() for name, x in found.items()}


@pytest.mark.parametrize("size", SIZES + [pytest.param(size, marks=pytest.mark.heavy) for size in HEAVY_SIZES], ids=str)
def test_alignment_loss(benchmark, size):
    rows, words, dim = size
    inputs, prior = make_inputs(*size)
    peers = {
        "eager": step(reference.alignment_loss, inputs, prior),
        "compiled": step(torch.compile(reference.alignment_loss, dynamic=False), inputs, prior),
    }
    ours = step(ck.alignment_loss, inputs, prior)
    found, plain = ours(), peers["compiled"]()  # of all rows: those that `errors` can afford may lack what the others have
    assert (found - plain).abs().max() <= 1e-4 * plain.abs().max()
    compare(
        benchmark,
        ours,
        peers,
        group="alignment_loss sinkhorn, forward+backward",
        case=f"n={rows} V={words} D={dim}",
        operations=3 * 2.0 * rows * words * dim,  # the least: text scores, vision scores, gradient
        rounds=3,
        **errors(inputs, prior),
    )
    info = benchmark.extra_info
    print(f"  extra memory: {', '.join(f'{name} {mib:.0f} MiB' for name, mib in info['memory_mib'].items())}")


@pytest.mark.parametrize("size", [(256, 49152, 576), pytest.param((2048, 49152, 576), marks=pytest.mark.heavy)], ids=str)
def test_against_liger(benchmark, size):
    """Mode "softmax", the one target that both can make; see alignment_peers for what the peer does and leaves out."""
    (vision, text, prototypes), _ = make_inputs(*size)
    peer = liger(vision, text, prototypes, 0.05)
    if peer is None:
        pytest.skip("liger-kernel is not installed (pip install --no-deps liger-kernel)")
    vision, text, prototypes = (torch.nn.functional.normalize(x.detach(), dim=-1) for x in (vision, text, prototypes))
    vision.requires_grad_()
    settings = dict(mode="softmax", epsilon=0.05, temperature=0.05, normalize=False)

    def ours(**extra):
        return torch.autograd.grad(ck.alignment_loss(vision, text, prototypes, **settings, **extra), vision)[0]

    torch.testing.assert_close(ours(), peer(), rtol=1e-3, atol=1e-5)
    compare(
        benchmark,
        ours,
        {"liger": peer, "eager": lambda: ours(backend="reference")},
        group="alignment_loss softmax, forward+backward",
        case="n={} V={} D={}".format(*size),
        operations=3 * 2.0 * size[0] * size[1] * size[2],
        rounds=3,
    )


@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=pytest.mark.heavy)], ids=("ours", "eager"))
@pytest.mark.parametrize("dim", [896, pytest.param(3584, marks=pytest.mark.heavy)])
def test_large_batch(benchmark, eager, dim):
    """Where the eager version fills a machine of 8 GiB: ours alone, and with --heavy the eager version."""
    size = (2048, 151936, dim)
    needed = 10 if dim == 896 else 18
    if eager and available_gib() < needed:
        pytest.skip(f"{available_gib():.0f} GiB are free, {needed} are asked for")
    inputs, prior = make_inputs(*size)
    function = step(reference.alignment_loss if eager else ck.alignment_loss, inputs, prior)
    memory = []
    benchmark.pedantic(lambda: memory.append(peak_memory(function)), rounds=1)
    name = "eager" if eager else "ours"
    benchmark.extra_info.update(memory_mib=memory[0])
    seconds = benchmark.stats.stats.median
    print(f"\n{name} n={size[0]} V={size[1]} D={size[2]}: {seconds:.1f} s, {memory[0]:.0f} MiB of extra memory")
