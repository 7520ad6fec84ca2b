"""sinkhorn on the device: errors against float64 on every backend and dtype, exact gradients of small matrices, CUDA graphs."""

import pytest
import torch
from device import DEVICE, HAS_GPU, captured, check_nothing_waits, kernels_of

import comp_kernels as ck
from comp_kernels import reference
from comp_kernels.testing import SINKHORN_CASES, SinkhornCase, assert_within_budget, make_sinkhorn_inputs

BACKENDS = kernels_of("sinkhorn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = SINKHORN_CASES
if HAS_GPU:  # long rows, long columns, a batch: several blocks on each
    shapes = dict(long_rows=(64, 40000), long_columns=(3000, 512), long_batch=(8, 100, 4097))
    CASES = CASES | {name: SinkhornCase(name, shape, epsilon=0.05) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, case, dtype):
    case, dtype = CASES[case], DTYPES[dtype]
    scores, marginals = make_sinkhorn_inputs(case, dtype)
    scores, marginals = scores.to(DEVICE), {name: x.to(DEVICE) for name, x in marginals.items()}
    settings = dict(epsilon=case.epsilon, num_iters=case.num_iters, return_potentials=True)
    found = ck.sinkhorn(scores, **marginals, **settings, backend=backend)
    exact = reference.sinkhorn(scores.double(), **{name: x.double() for name, x in marginals.items()}, **settings)
    peer = reference.sinkhorn(scores, **marginals, **settings)
    exponents = float(scores.double().abs().max()) / case.epsilon  # the potentials are differences of these
    for name, *triple in zip(("plan", "u", "v"), found, exact, peer):
        assert_within_budget(name, *triple, largest_term=0.0 if name == "plan" else exponents)


@pytest.mark.parametrize("shape", ((1000, 4, 4), (50, 8, 8), (20, 16, 16), (5, 32, 32), (40, 3, 7)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_the_iterations(backend, shape):
    """As the projection of hyper-connections uses it."""
    scores = torch.randn(shape, device=DEVICE)
    weights = torch.randn(shape, device=DEVICE)
    settings = dict(epsilon=1.0, num_iters=20, order="rows_cols", eps=1e-6)

    def both(function, x, **more):
        x = x.detach().requires_grad_()
        plan = function(x, **settings, **more)
        return plan.detach(), torch.autograd.grad(plan, x, weights.to(plan.dtype))[0]

    found = both(ck.sinkhorn, scores, gradient="unrolled", backend=backend)
    exact, peer = both(reference.sinkhorn, scores.double()), both(reference.sinkhorn, scores)
    terms = (0.0, float(weights.abs().max()))  # gradients are sums of what all entries receive
    for name, term, *triple in zip(("plan", "gradient"), terms, found, exact, peer):
        assert_within_budget(name, *triple, largest_term=term)


@pytest.mark.parametrize("shape", ((64, 5000), (3, 100, 300), (500, 4, 4)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_serves_other_scores(backend, shape):
    scores = torch.randn(shape, device=DEVICE) * 0.1

    def solve():
        return ck.sinkhorn(scores, epsilon=0.05, backend=backend, return_potentials=True)

    replay = captured(solve)
    for _ in range(2):
        scores.normal_(std=0.1)
        found = [x.clone() for x in replay()]
        for ours, expected in zip(found, solve()):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend):
    scores = torch.randn(64, 5000, device=DEVICE)
    small = torch.randn(100, 4, 4, device=DEVICE, requires_grad=True)

    def step():
        ck.sinkhorn(scores, epsilon=0.05, backend=backend)
        ck.sinkhorn(small, epsilon=1.0, gradient="unrolled", backend=backend).sum().backward()

    check_nothing_waits(step)
