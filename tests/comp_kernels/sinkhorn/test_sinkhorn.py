"""sinkhorn on every backend: the definition's answers and POT's, what a plan must satisfy, and its gradients."""

import math

import numpy as np
import ot
import pytest
import torch

import comp_kernels as ck
from comp_kernels import reference
from comp_kernels.ops.sinkhorn import cpu, gradients
from comp_kernels.ops.sinkhorn.call import Call
from comp_kernels.testing import SINKHORN_CASES, SinkhornCase, assert_within_budget, make_sinkhorn_inputs

BACKENDS = [name for name in ck.available_backends("sinkhorn", "cpu") if name != "reference"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


# The interpreter is slow: it gets every case in one dtype, and one case in the others.
CASES = [(name, dtype, "cpu") for name in SINKHORN_CASES for dtype in DTYPES]
if "triton" in BACKENDS:
    CASES += [(name, "float32", "triton") for name in SINKHORN_CASES]
    CASES += [("marginals_per_item", dtype, "triton") for dtype in ("bfloat16", "float16")]


def test_the_compiled_backend_is_there():
    assert "cpu" in BACKENDS


@pytest.mark.parametrize("name, dtype, backend", CASES)
def test_matches_the_definition(name, dtype, backend):
    case, dtype = SINKHORN_CASES[name], DTYPES[dtype]
    scores, marginals = make_sinkhorn_inputs(case, dtype)
    settings = dict(epsilon=case.epsilon, num_iters=case.num_iters, return_potentials=True)
    actual = ck.sinkhorn(scores, **marginals, **settings, backend=backend)
    exact = reference.sinkhorn(scores.double(), **{key: x.double() for key, x in marginals.items()}, **settings)
    peer = reference.sinkhorn(scores, **marginals, **settings)
    exponents = float(scores.double().abs().max()) / case.epsilon  # the potentials are differences of these
    for label, found, truth, plain in zip(("plan", "u", "v"), actual, exact, peer):
        if dtype == torch.float64:  # no peer is more exact than float64
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)
        else:
            largest_term = 0.0 if label == "plan" else exponents
            assert_within_budget(f"{name} {label}", found, truth, plain, largest_term=largest_term)
    assert actual[0].dtype == torch.promote_types(dtype, torch.float32)


def assert_defaults_are_their_values(
    shape: tuple[int, ...], backend: str, dtype=torch.float32, same_bits: bool = True, **settings
) -> None:
    """Marginals that are left out give the bits of those that are written down, in the gradient too."""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    *_, n, k = shape
    compute = torch.promote_types(dtype, torch.float32)
    written = dict(row_marginals=torch.ones(n, dtype=compute), col_marginals=torch.full((k,), n / k, dtype=compute))
    settings = dict(epsilon=0.3, gradient="detach" if "tol" in settings else "unrolled", **settings)
    found = []
    for marginals in ({}, written):
        leaf = scores.clone().requires_grad_()
        results = ck.sinkhorn(leaf, **settings, **marginals, backend=backend, return_potentials=True)
        if results[0].requires_grad:
            results += torch.autograd.grad([x.square().sum() for x in results], leaf)
        found.append(results)
    for x, y in zip(*found):
        assert torch.equal(x, y) if same_bits else (x - y).abs().max() <= 1e-6 * y.abs().max()


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize(
    "settings", (dict(), dict(order="rows_cols"), dict(tol=1e-2), dict(eps=1e-3)), ids=lambda x: "".join(x) or "plain"
)
def test_default_marginals_are_their_values(backend, settings):
    for shape in ((4, 4), (2, 3, 5, 7), *(((40, 70), (3, 20, 331)) if "eps" not in settings else ())):
        assert_defaults_are_their_values(shape, backend, **settings)
    if backend in ("reference", "cpu"):
        assert_defaults_are_their_values((7, 3, 5), backend, torch.float64, **settings)
        assert_defaults_are_their_values((70, 40), backend, torch.bfloat16, order="rows_cols")


@pytest.mark.parametrize("num_iters", (1, 3, 20))
def test_equals_pot(num_iters):
    """POT's log-domain Sinkhorn does the same half steps in the same order."""
    scores = torch.randn(13, 57, dtype=torch.float64)
    a, b = (torch.rand(n, dtype=torch.float64) + 0.1 for n in scores.shape)
    b *= a.sum() / b.sum()
    theirs = ot.bregman.sinkhorn_log(a, b, -scores, 0.1, numItermax=num_iters, stopThr=0, warn=False)
    ours = ck.sinkhorn(scores, epsilon=0.1, num_iters=num_iters, row_marginals=a, col_marginals=b, backend="cpu")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_equals_pot_in_batches():
    log_kernel = torch.randn(4, 9, 21, dtype=torch.float64)
    a, b = torch.rand(4, 9, dtype=torch.float64) + 0.1, torch.rand(4, 21, dtype=torch.float64) + 0.1
    b *= a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
    theirs = ot.batch.bregman_log_projection_batch(log_kernel, a, b, max_iter=2000, tol=1e-12)["T"]
    ours = ck.sinkhorn(log_kernel, epsilon=1.0, num_iters=2000, row_marginals=a, col_marginals=b, backend="cpu")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_marginals_are_met_and_shifts_of_the_scores_change_nothing(backend):
    scores, marginals = make_sinkhorn_inputs(SinkhornCase("", (2, 7, 12), marginals="per_item"))
    settings = dict(epsilon=2.0, num_iters=15, backend=backend, **marginals)
    plan = ck.sinkhorn(scores, **settings)
    torch.testing.assert_close(plan.sum(-1), marginals["row_marginals"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plan.sum(-2), marginals["col_marginals"], rtol=1e-5, atol=1e-6)
    shifted = scores + torch.randn(2, 7, 1) + torch.randn(2, 1, 12)
    torch.testing.assert_close(ck.sinkhorn(shifted, **settings), plan, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_exact_after_any_number_of_iterations(backend):
    for num_iters in (1, 2, 5):
        plan = ck.sinkhorn(torch.randn(2, 6, 50), epsilon=0.05, num_iters=num_iters, backend=backend)
        torch.testing.assert_close(plan.sum(-1), torch.ones(2, 6), rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_the_range_of_a_float(backend):
    """At epsilon = 0.001 cosines span 2000 nats: whole rows fall below the smallest float next to the others' maxima."""
    features, prototypes = (torch.nn.functional.normalize(torch.randn(n, 8), dim=-1) for n in (9, 300))
    scores = features @ prototypes.T
    scores[0] = -1.0 + 0.01 * torch.randn(300)
    scores[1] = 1.0
    settings = dict(epsilon=0.001, num_iters=4, return_potentials=True)
    actual = ck.sinkhorn(scores, **settings, backend=backend)
    exact = reference.sinkhorn(scores.double(), **settings)
    peer = reference.sinkhorn(scores, **settings)
    for label, *triple in zip(("plan", "u", "v"), actual, exact, peer):
        # Potentials of 2,900 bits lie one binade above the definition's 2,000 nats, where floats are twice as far apart.
        assert_within_budget(label, *triple, factor=4.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("order", ("cols_rows", "rows_cols"))
@pytest.mark.parametrize("tol", (None, 1e-3))
@pytest.mark.parametrize("bits", (20, 27, 30, 40))
def test_exponents_without_digits_left(bits, tol, order, dtype):
    """At 2^27 neighbouring float32 numbers are 16 nats apart: potentials of that size need double, or plans end as NaN."""
    torch.manual_seed(bits)
    scores = (torch.randn(2, 40, 50) * 2.0**bits).to(dtype)
    scores[1] *= 2.0**-bits  # beside an ordinary one
    settings = dict(epsilon=1.0, num_iters=6, tol=tol, order=order)
    exact = reference.sinkhorn(scores.double(), **settings)
    plan = ck.sinkhorn(scores, **settings, backend="cpu")
    torch.testing.assert_close(plan.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("places", [(slice(None), slice(None)), (3, slice(None)), (slice(None), 300), (3, 300)], ids=str)
def test_plans_are_plans_however_large_the_scores(places, dtype):
    """Where not even double has digits left, rows still sum to their marginals; infinite and undefined scores stay visible."""
    torch.manual_seed(0)
    for size in (1e6, 1e9, 1e20, 1e37):
        scores = torch.randn(40, 400, dtype=dtype)
        scores[places] *= size
        plan = ck.sinkhorn(scores, epsilon=0.05, backend="cpu")
        torch.testing.assert_close(plan.sum(-1), torch.ones(40, dtype=dtype), rtol=1e-5, atol=0)
        assert plan.amax() <= 1 + 1e-6
        scores[7, 9] = torch.nan
        assert ck.sinkhorn(scores, epsilon=0.05, backend="cpu").isnan().any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("order", ("cols_rows", "rows_cols"))
@pytest.mark.parametrize("bits", (100, 126.5, 127.5, 128, 150, 200, 255, 300, 383, 400, 1100, 2000))
def test_a_single_exponent_beyond_the_range(bits, order, dtype):
    """A few entries judge first whether a shift is needed; one elsewhere counts as much, whatever 2^bits wraps around to."""
    scores = torch.rand(40, 300, generator=torch.Generator().manual_seed(0), dtype=dtype)
    scores[5, 280] = bits * math.log(2)
    settings = dict(epsilon=1.0, num_iters=3, order=order)
    plan, exact = ck.sinkhorn(scores, **settings, backend="cpu"), reference.sinkhorn(scores.double(), **settings)
    if dtype == torch.float64:  # no peer is more exact
        torch.testing.assert_close(plan, exact, rtol=1e-10, atol=1e-12)
    else:
        assert_within_budget(f"{bits} bits", plan, exact, reference.sinkhorn(scores, **settings))


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_beyond_the_range_of_a_float(backend):
    """Row masses that span 30 orders of magnitude take whole columns below the range between two half steps."""
    scores = torch.randn(6, 40)
    rows = torch.logspace(-32, 0, 6)
    settings = dict(epsilon=0.02, num_iters=5, row_marginals=rows, return_potentials=True)
    actual = ck.sinkhorn(scores, **settings, backend=backend)
    exact = reference.sinkhorn(scores.double(), **{**settings, "row_marginals": rows.double()})
    peer = reference.sinkhorn(scores, **settings)
    for label, *triple in zip(("plan", "u", "v"), actual, exact, peer):
        assert_within_budget(label, *triple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tol", (1e-1, 1e-2, 1e-4))
def test_tolerance_stops_where_the_definition_stops(backend, tol):
    scores = torch.randn(3, 6, 10) * torch.tensor([0.2, 1.0, 2.0])[:, None, None]
    settings = dict(epsilon=0.8, num_iters=40, tol=tol, return_potentials=True)
    _, u, v = ck.sinkhorn(scores, **settings, backend=backend)
    _, exact_u, exact_v = reference.sinkhorn(scores.double(), **settings)
    _, last_u, _ = reference.sinkhorn(scores.double(), **{**settings, "tol": None})
    assert (exact_u - last_u).abs().max() > 1e-4 or tol < 1e-3  # it does stop early
    torch.testing.assert_close(u.double(), exact_u, rtol=0, atol=1e-4)
    torch.testing.assert_close(v.double(), exact_v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_transport(shape):
    plan, u, v = ck.sinkhorn(torch.randn(shape), epsilon=1.0, return_potentials=True)
    assert plan.shape == shape and u.shape == shape[:-1] and v.shape == (shape[0], shape[2])
    # Rows that want mass of no columns have no finite potential, nor have columns without rows, which want none.
    assert (u == torch.inf).all() and (v == -torch.inf).all()


def test_marginals_that_are_no_numbers_reach_the_plan():
    """Where values are not looked at, in a compiled graph, NaN must not pass for zero."""
    for num_iters in (1, 4):
        rows, cols = torch.ones(4), torch.full((6,), 4 / 6).index_fill(0, torch.tensor([2]), torch.nan)
        plan, _, _ = cpu.forward(Call(torch.randn(1, 4, 6), rows, cols, 0.5, num_iters, None, None))
        assert plan.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    whole = torch.randn(2, 9, 16)
    for view in (whole[:, ::2, 3:12], whole.mT, whole[0], whole.view(2, 1, 9, 16), whole[:, :, ::2]):
        settings = dict(epsilon=0.3, num_iters=1, backend=backend)
        torch.testing.assert_close(ck.sinkhorn(view, **settings), ck.sinkhorn(view.clone(), **settings), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 37, 5000), (1, 21, 20011), (3, 50, 777)], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(shape):
    """Narrow matrices are iterated by rows, wide ones by blocks of columns, batches item by item."""
    scores = torch.randn(shape)
    threads = torch.get_num_threads()
    try:
        plans = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            plans.append(ck.sinkhorn(scores, epsilon=0.05, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(plans[0], plans[1]) and torch.equal(plans[0], plans[2])


@pytest.mark.parametrize("shape", [(30, 50, 4096), (6, 50, 20011), (3, 130, 16384)], ids=str)
def test_batches_beyond_the_cache_equal_their_items(shape):
    """Such a batch keeps its exponentials in the memory of later plans, for each thread or for all together. One
    item spans so many bits that its exponentials are taken again."""
    scores = torch.randn(shape)
    scores[1] *= 30
    alone = torch.stack([ck.sinkhorn(item, epsilon=0.05, backend="cpu") for item in scores])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ck.sinkhorn(scores, epsilon=0.05, backend="cpu"), alone)
    finally:
        torch.set_num_threads(threads)


# Columns whose maxima have to be subtracted first; entries that need no shift; rows that grow so uneven that the plan is taken
# from the scores again, after the first iteration or later ones.
KINDS_OF_SCORES = {
    "large": lambda scores: 40 * scores,
    "small": lambda scores: scores,
    "uneven rows": lambda scores: scores - torch.linspace(0, 6, scores.shape[-2])[:, None],
    "steep": lambda scores: torch.where(
        torch.arange(scores.shape[-1]) % 7 == 0, scores, scores - 3 * torch.rand(scores.shape[-2], 1)
    ),
}


# Rows of 4,096 to 17,003 columns: sums of so many terms in one float lose five digits. 301 of 4,100: several pieces of rows,
# each with its own column sums.
@pytest.mark.parametrize("kind", KINDS_OF_SCORES)
@pytest.mark.parametrize(
    "shape", [(13, 301), (9, 17003), (34, 8192), pytest.param((2, 301, 4100), marks=pytest.mark.slow), (2, 34, 65)], ids=str
)
def test_many_iterations_on_the_kept_plan(shape, kind):
    scores = KINDS_OF_SCORES[kind](torch.rand(shape) * 2 - 1)
    cols = torch.rand(shape[-1]) + 0.1
    cols[3] = 0
    settings = dict(epsilon=0.1, num_iters=25, return_potentials=True)
    settings["col_marginals"] = cols * (shape[-2] / cols.sum())
    actual = ck.sinkhorn(scores, **settings, backend="cpu")
    exact = reference.sinkhorn(scores.double(), **{**settings, "col_marginals": settings["col_marginals"].double()})
    peer = reference.sinkhorn(scores, **settings)
    for label, *triple in zip(("plan", "u", "v"), actual, exact, peer):
        assert_within_budget(f"{kind} {label}", *triple)


# --- gradients -------------------------------------------------------------------------------------------------------------


def weighted(outputs, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)


def test_detached_by_default():
    scores = torch.randn(4, 6, requires_grad=True)
    plan, u, v = ck.sinkhorn(scores, epsilon=0.5, return_potentials=True)
    assert not (plan.requires_grad or u.requires_grad or v.requires_grad)


@pytest.mark.parametrize("marginals", ("default", "zeros"))
def test_unrolled_gradcheck(marginals):
    scores = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    settings = dict(epsilon=0.4, num_iters=2, gradient="unrolled", backend="cpu")
    if marginals == "zeros":
        settings["row_marginals"] = torch.tensor([1.0, 0.0, 0.5, 1.5], dtype=torch.float64)
        settings["col_marginals"] = torch.tensor([0.5, 0.5, 0.0, 1.0, 0.7, 0.3], dtype=torch.float64)

    def function(scores):
        plan, u, v = ck.sinkhorn(scores, return_potentials=True, **settings)
        return plan, torch.where(u.isfinite(), u, 0.0), torch.where(v.isfinite(), v, 0.0)

    assert torch.autograd.gradcheck(function, scores)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_unrolled_equals_autograd_through_the_definition(backend):
    scores = torch.randn(3, 5, 11, requires_grad=True)
    settings = dict(epsilon=0.2, num_iters=3, return_potentials=True)
    (ours,) = torch.autograd.grad(weighted(ck.sinkhorn(scores, gradient="unrolled", backend=backend, **settings)), scores)
    (exact,) = torch.autograd.grad(weighted(reference.sinkhorn(scores, **settings)), scores)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


def test_implicit_gradcheck():
    scores = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1.0, 0.0, 0.5, 1.5], dtype=torch.float64)
    cols = torch.tensor([0.5, 0.5, 0.0, 1.0, 0.7, 0.3], dtype=torch.float64)
    settings = dict(epsilon=0.6, num_iters=500, row_marginals=rows, col_marginals=cols, gradient="implicit", backend="cpu")
    assert torch.autograd.gradcheck(lambda scores: ck.sinkhorn(scores, **settings), scores)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_implicit_gradient_in_float32(backend):
    """Its system is singular, and what rounding leaves there must not grow: to the size of the gradient, in the worst draw."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        shape = (int(torch.randint(1, 8, (), generator=generator)), 63 if seed % 2 else 9)
        scores, cotangent = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

        def gradient(dtype, scores=scores, cotangent=cotangent):
            leaf = (0.2 * scores).to(dtype).requires_grad_()
            plan = ck.sinkhorn(leaf, epsilon=0.5, num_iters=100, gradient="implicit", backend=backend)
            return torch.autograd.grad(plan, leaf, cotangent.to(dtype))[0].double()

        torch.testing.assert_close(gradient(torch.float32), gradient(torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 6), (40, 50)])
def test_implicit_gradients_of_potentials(shape):
    """Exact where the loss does not see a constant that moves from u to v; refused where it does, for no equation tells it."""
    scores = 0.3 * torch.randn(shape, dtype=torch.float64)
    weights = torch.randn(shape[-2], dtype=torch.float64)
    losses = {
        "means": lambda u, v: ((u - u.mean(-1, keepdim=True)) * weights).sum() + (v - v.mean(-1, keepdim=True)).square().sum(),
        "sums": lambda u, v: (u.unsqueeze(-1) + v.unsqueeze(-2)).square().sum(),
        "dual": lambda u, v: u.sum() + v.sum() * shape[-2] / shape[-1],
        "u": lambda u, v: (u * (weights + 1)).sum(),
        "v": lambda u, v: v.square().sum(),
    }
    for name, loss in losses.items():
        found = []
        for gradient in ("unrolled", "implicit"):
            leaf = scores.clone().requires_grad_()
            _, u, v = ck.sinkhorn(leaf, epsilon=1.0, num_iters=500, gradient=gradient, return_potentials=True)
            if gradient == "implicit" and name in ("u", "v"):
                with pytest.raises(
                    ValueError, match=r"gradient='implicit' is that of the converged plan, .* must not depend on c"
                ):
                    loss(u, v).backward()
                continue
            found.append(torch.autograd.grad(loss(u, v), leaf)[0])
        if len(found) == 2:
            torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


def test_implicit_gradients_do_not_depend_on_the_batch():
    """Of plans, too, that have not met their columns, where conjugate gradients stop early: they grew while others went on."""
    scores, weights = torch.randn(2, 20, 4, 4, generator=torch.Generator().manual_seed(0))

    def gradient(scores, weights):
        leaf = scores.clone().requires_grad_()
        plan = ck.sinkhorn(leaf, epsilon=0.05, num_iters=500, gradient="implicit")
        return torch.autograd.grad((plan * weights).sum(), leaf)[0]

    one_by_one = torch.cat([gradient(x, w) for x, w in zip(scores.split(1), weights.split(1))])
    torch.testing.assert_close(gradient(scores, weights), one_by_one, rtol=1e-2, atol=1e-2)


def test_implicit_equals_unrolled_once_converged():
    scores = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for gradient in ("implicit", "unrolled"):
        plan = ck.sinkhorn(scores, epsilon=0.5, num_iters=300, gradient=gradient, backend="cpu")
        found += torch.autograd.grad(weighted([plan]), scores)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


# --- as an operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", gradients.MODES)
def test_opcheck(gradient):
    scores = torch.randn(2, 4, 6, requires_grad=gradient != "detach")
    arguments = (scores, torch.ones(4), torch.full((6,), 4 / 6), 0.5, 3, None, None, "cols_rows", 0.0, gradient, "cpu", False)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if gradient != "implicit":  # which has no gradient of the random sums that this one draws
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.comp_kernels.sinkhorn.default, arguments, test_utils=checks)


def test_compiles_into_one_graph():
    scores = torch.randn(5, 40, requires_grad=True)

    def function(scores):
        return ck.sinkhorn(scores * 2, epsilon=0.3, gradient="unrolled", col_marginals=torch.full((40,), 5 / 40)).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(scores), scores)
    (found,) = torch.autograd.grad(compiled(scores), scores)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", ((4, 4), (40, 5), (3, 4, 6)))
def test_compiles_with_sizes_that_are_symbols_beside_those_that_are_not(shape):
    """Marginals out of the graph's own constants, and as arguments."""
    *batch, num_rows, num_cols = shape
    torch._dynamo.reset()

    def function(scores, cols):
        rows = torch.ones(num_rows)
        plain = ck.sinkhorn(scores, epsilon=0.3, row_marginals=rows, col_marginals=cols)
        return plain + ck.sinkhorn(scores, epsilon=0.3, row_marginals=rows.expand(*batch, num_rows))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    scores, cols = torch.randn(shape), torch.full((num_cols,), num_rows / num_cols)
    torch.testing.assert_close(compiled(scores, cols), function(scores, cols))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(epsilon=0.0), "epsilon must be positive, got 0.0"),
        (dict(num_iters=0), "num_iters must be at least 1, got 0"),
        (dict(num_iters=2.0), "num_iters must be an integer, got float 2.0"),
        (dict(epsilon=torch.tensor(0.5, requires_grad=True)), "epsilon must be a number, not a tensor"),
        (dict(epsilon="small"), "epsilon must be a number, not a tensor .* got str 'small'"),
        (dict(gradient=np.ones(2)), "gradient must be one of"),
        (dict(return_potentials=1), "return_potentials must be True or False, got int 1"),
        (dict(tol=-1e-3), "tol must not be negative or NaN, got -0.001"),
        (dict(tol=float("nan")), "tol must not be negative or NaN, got nan"),
        (dict(group="world"), "group must be a torch.distributed.ProcessGroup or None, got str 'world'"),
        (dict(row_marginals=torch.ones(4, dtype=torch.complex64)), "row_marginals must be real, got torch.complex64"),
        (
            dict(col_marginals=torch.ones(6, dtype=torch.uint32)),
            "col_marginals must not be torch.uint32, .*: pass col_marginals",
        ),
        (dict(row_marginals=torch.ones(5)), r"row_marginals must be \(4,\) or \(2, 4\)"),
        (dict(col_marginals=torch.full((6,), -1.0)), "col_marginals must not be negative"),
        (dict(col_marginals=torch.ones(6)), "must have the same sum"),
        (dict(gradient="envelope"), "gradient must be one of"),
        (dict(gradient="unrolled", tol=0.1), "tol must be None, got 0.1"),
        (dict(gradient="implicit", row_marginals=torch.ones(4, requires_grad=True)), "row_marginals receives no gradient"),
        (dict(backend="fast"), "backend must be one of"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ck.sinkhorn(torch.randn(2, 4, 6), **{"epsilon": 0.5, **kwargs})


def test_errors_about_the_scores():
    with pytest.raises(ValueError, match=r"scores must be \[\.\.\., n, K\], got shape \(4,\)"):
        ck.sinkhorn(torch.randn(4), epsilon=0.5)
    with pytest.raises(ValueError, match="scores must be float32"):
        ck.sinkhorn(torch.ones(4, 4, dtype=torch.int64), epsilon=0.5)


@pytest.mark.parametrize("backend", ck.available_backends("sinkhorn", "cpu"))
def test_a_row_or_column_without_scores_is_named(backend):
    scores = torch.randn(2, 5, 7)
    row, column = scores.clone(), scores.clone()
    row[1, 3], column[0, :, 6] = -torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"scores of row 3 of item \[1\] are all -inf, .* row_marginals to zero"):
        ck.sinkhorn(row, epsilon=0.5, backend=backend)
    with pytest.raises(ValueError, match=r"scores of column 6 of item \[0\] are all -inf, .* col_marginals to zero"):
        ck.sinkhorn(column, epsilon=0.5, backend=backend)
    masked = torch.ones(2, 5)
    masked[1, 3] = 0
    assert ck.sinkhorn(row, epsilon=0.5, row_marginals=masked, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", ("definition", "reference", *BACKENDS))
@pytest.mark.parametrize("order", ("cols_rows", "rows_cols"))
@pytest.mark.parametrize("shape", ((5, 7), (40, 35)))
def test_masked_rows_and_columns_have_no_gradient_and_change_no_other(shape, order, backend):
    """Scores of -inf and marginals of zero: as if they were not there. The last item has no mass at all."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    scores = torch.randn(3, *shape, dtype=dtype)
    scores[:, 3], scores[:, :, 2] = -torch.inf, -torch.inf
    rows, cols = (torch.rand(3, length, dtype=dtype) + 0.5 for length in shape)
    rows[:, 3], cols[:, 2], rows[2], cols[2] = 0, 0, 0, 0
    rows, cols = (x / x.sum(-1, keepdim=True).clamp(min=1e-9) for x in (rows, cols))
    cotangent = torch.randn_like(scores)

    def plan_and_gradient(function, scores, rows, cols, cotangent, **settings):
        leaf = scores.clone().requires_grad_()
        plan = function(leaf, epsilon=0.5, row_marginals=rows, col_marginals=cols, order=order, **settings)
        return plan.detach(), torch.autograd.grad(plan, leaf, cotangent)[0]

    if backend == "definition":
        found = plan_and_gradient(reference.sinkhorn, scores, rows, cols, cotangent)
    else:
        found = plan_and_gradient(ck.sinkhorn, scores, rows, cols, cotangent, gradient="unrolled", backend=backend)
    kept = [[i for i in range(length) if i != masked] for length, masked in zip(shape, (3, 2))]
    without = plan_and_gradient(
        reference.sinkhorn,
        *(scores[:2, kept[0]][..., kept[1]], rows[:2, kept[0]], cols[:2, kept[1]], cotangent[:2, kept[0]][..., kept[1]]),
    )
    bound = dict(rtol=1e-4, atol=1e-5) if backend == "triton" else dict(rtol=1e-9, atol=1e-12)
    for actual, expected in zip(found, without):
        whole = torch.zeros_like(actual)
        whole[:2, torch.tensor(kept[0])[:, None], kept[1]] = expected
        torch.testing.assert_close(actual, whole, **bound)
