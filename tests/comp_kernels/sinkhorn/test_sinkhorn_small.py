"""sinkhorn over many small matrices: either order, eps, exact gradients of the iterations as run, and hostile inputs."""

import re

import pytest
import torch

import comp_kernels as ck
from benchmarks.sinkhorn_peers import mhc_loop
from comp_kernels import reference
from comp_kernels.ops.sinkhorn.registration import BACKWARD, FORWARD
from comp_kernels.testing import assert_within_budget

BACKENDS = [name for name in ck.available_backends("sinkhorn", "cpu") if name != "reference"]
SHAPES = [(37, 4, 4), (21, 8, 8), (3, 16, 16), (2, 32, 32), (19, 3, 7), (2, 5, 31, 9), (1, 1, 9), (18, 2, 1), (4, 4)]
ORDERS = ("cols_rows", "rows_cols")
KINDS = {  # what scores look like: entries that one scaling holds, such that span too many bits for it, and both in one batch
    "ordinary": lambda shape: torch.randn(shape, dtype=torch.float64),
    "wide": lambda shape: 60 * torch.randn(shape, dtype=torch.float64),
    "mixed": lambda shape: (
        10 ** (2 * torch.rand(*shape[:-2], 1, 1, dtype=torch.float64)) * torch.randn(shape, dtype=torch.float64)
    ),
}


def random_marginals(shape, per_item):
    """Marginals of equal sum, one of each zero where there are two."""
    *batch, rows, cols = shape
    a, b = (torch.rand(*(batch if per_item else []), side, dtype=torch.float64) + 0.1 for side in (rows, cols))
    for x in (a, b):
        if x.shape[-1] > 1:
            x[..., 1] = 0
    return dict(row_marginals=a, col_marginals=b * a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))


def with_gradient(function, scores, weights, **settings):
    """(plan, u, v, gradient of their weighted sum), potentials of no mass left out of the sum."""
    scores = scores.detach().requires_grad_()
    outputs = function(scores, return_potentials=True, **settings)
    loss = sum((torch.where(x.isfinite(), x, 0.0) * w.to(x.dtype)).sum() for x, w in zip(outputs, weights))
    return *(x.detach() for x in outputs), torch.autograd.grad(loss, scores)[0]


def assert_equals_the_definition(scores, marginals, backend, **settings):
    *batch, rows, cols = scores.shape
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((*batch, rows, cols), (*batch, rows), (*batch, cols))]
    compute = torch.promote_types(scores.dtype, torch.float32)
    own_marginals = {name: x.to(compute) for name, x in marginals.items()}
    exact_marginals = {name: x.double() for name, x in own_marginals.items()}
    found = with_gradient(ck.sinkhorn, scores, weights, backend=backend, gradient="unrolled", **own_marginals, **settings)
    exact = with_gradient(reference.sinkhorn, scores.double(), weights, **exact_marginals, **settings)
    peer = with_gradient(reference.sinkhorn, scores, weights, **own_marginals, **settings)
    exponents = float(scores.double().abs().max()) / settings["epsilon"]  # potentials are differences of these,
    terms = sum(float(w.abs().max()) for w in weights) / settings["epsilon"]  # gradients sums of what all outputs receive,
    if scores.dtype != torch.float32:  # next to whose rounding to 16 bits that of the terms is nothing
        terms = 0.0
    terms_of = dict(plan=0.0, u=exponents, v=exponents, gradient=terms)
    for (label, term), ours, truth, plain in zip(terms_of.items(), found, exact, peer):
        if scores.dtype == torch.float64:
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)
        else:
            assert_within_budget(label, ours, truth, plain, largest_term=term)
    assert found[0].dtype == compute and found[3].dtype == scores.dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_with_gradients(shape, order, kind):
    assert_equals_the_definition(KINDS[kind](shape).float(), {}, "cpu", epsilon=0.7, num_iters=6, order=order)


@pytest.mark.parametrize("eps", (1e-6, 1e-2))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_with_eps(shape, order, eps):
    for kind in ("ordinary", "wide"):
        scores = KINDS[kind](shape).float()
        assert_equals_the_definition(scores, {}, "cpu", epsilon=0.7, num_iters=6, order=order, eps=eps)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("eps", (0.0, 1e-4))
@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_definition_in_other_dtypes(order, eps, dtype):
    for shape, kind in (((37, 4, 4), "mixed"), ((21, 8, 8), "ordinary"), ((2, 5, 9, 14), "mixed")):
        assert_equals_the_definition(KINDS[kind](shape).to(dtype), {}, "cpu", epsilon=0.7, num_iters=5, order=order, eps=eps)


@pytest.mark.parametrize("per_item", (False, True))
@pytest.mark.parametrize("eps", (0.0, 1e-4))
@pytest.mark.parametrize("order", ORDERS)
def test_marginals_other_than_ones(order, eps, per_item):
    for shape in ((37, 4, 4), (19, 3, 7), (2, 5, 31, 9)):
        for kind in ("ordinary", "mixed"):
            marginals = random_marginals(shape, per_item)
            scores = KINDS[kind](shape).float()
            assert_equals_the_definition(scores, marginals, "cpu", epsilon=0.7, num_iters=4, order=order, eps=eps)


def test_marginals_over_many_orders_of_magnitude():
    marginals = dict(row_marginals=torch.logspace(-32, 0, 6), col_marginals=torch.full((4,), 0.25))
    marginals["col_marginals"] *= marginals["row_marginals"].sum()
    assert_equals_the_definition(torch.randn(5, 6, 4), marginals, "cpu", epsilon=0.3, num_iters=5)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not on (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("shape, eps, kind, dtype", [
    ((37, 4, 4), 0.0, "mixed", torch.float32),
    ((37, 4, 4), 1e-4, "ordinary", torch.bfloat16),
    ((5, 3, 7), 0.0, "ordinary", torch.float16),
    ((3, 31, 9), 0.0, "ordinary", torch.float32),
    ((1, 1, 9), 1e-6, "wide", torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("order", ORDERS)
def test_triton_equals_the_definition(order, shape, eps, kind, dtype):
    marginals = random_marginals(shape, per_item=True) if shape == (5, 3, 7) else {}
    scores = KINDS[kind](shape).to(dtype)
    assert_equals_the_definition(scores, marginals, "triton", epsilon=0.7, num_iters=3, order=order, eps=eps)


# --- the conventions of the field ------------------------------------------------------------------------------------------


def sinkhorn_of_the_paper(logits, num_iterations):
    """T_c(T_r(M)) from M = exp(logits), mHC (arXiv 2512.24880), equation 9."""
    matrix = logits.exp()
    for _ in range(num_iterations):
        matrix = matrix / matrix.sum(-1, keepdim=True)
        matrix = matrix / matrix.sum(-2, keepdim=True)
    return matrix


@pytest.mark.parametrize("side", (2, 4, 8))
def test_numbers_of_megatron_and_of_the_paper(side):
    for scale in (1.0, 10.0):
        logits = (scale * torch.randn(2048, side, side)).requires_grad_()
        weights = torch.randn(logits.shape)
        for eps, theirs in ((1e-6, mhc_loop(logits, 20, 1e-6)), (0.0, sinkhorn_of_the_paper(logits, 20))):
            ours = ck.sinkhorn(logits, epsilon=1.0, num_iters=20, order="rows_cols", eps=eps, gradient="unrolled")
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            found, expected = (torch.autograd.grad((plan * weights).sum(), logits)[0] for plan in (ours, theirs))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("shape", [(6, 4, 4), (3, 40, 35)], ids=str)
def test_the_side_scaled_last_is_exact(backend, shape):
    """Matrices beyond the small ones too: their kernels scale the rows last, and are handed the transposed problem."""
    scores = torch.randn(shape)
    for num_iters in (1, 3):
        settings = dict(epsilon=0.5, num_iters=num_iters, backend=backend, return_potentials=True)
        plan, u, v = ck.sinkhorn(scores, order="rows_cols", **settings)
        torch.testing.assert_close(plan.sum(-2), torch.full(plan.sum(-2).shape, shape[-2] / shape[-1]), rtol=2e-5, atol=0)
        transposed, v_too, u_too = ck.sinkhorn(
            scores.mT,
            row_marginals=torch.full((shape[-1],), shape[-2] / shape[-1]),
            col_marginals=torch.ones(shape[-2]),
            **settings,
        )
        for found, expected in ((plan, transposed.mT), (u, u_too), (v, v_too)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert plan.is_contiguous()


def test_tolerance_looks_at_the_side_that_is_not_exact():
    scores = torch.randn(5, 4, 6)
    settings = dict(epsilon=0.7, num_iters=100, tol=1e-2)
    plan = ck.sinkhorn(scores, order="rows_cols", **settings)
    error = (plan.sum(-1) - 1).abs().sum(-1)
    assert (error <= 4e-2).all() and error.max() > 1e-5  # within the tolerance, and stopped there
    torch.testing.assert_close(plan, reference.sinkhorn(scores, order="rows_cols", **settings), rtol=1e-4, atol=1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", (0.0, 1e-3))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ("ordinary", "wide"))
def test_gradcheck(order, eps, kind):
    """Ties of the maximum included: the derivative is that of the iterations, and no maximum has a part in it."""
    scores = KINDS[kind]((3, 4, 4)) * (1.0 if kind == "ordinary" else 4.0)
    scores[0] = torch.tensor([1.0, 1.0, -0.5, 1.0], dtype=torch.float64)
    settings = dict(epsilon=0.6, num_iters=3, order=order, eps=eps, gradient="unrolled", backend="cpu", return_potentials=True)
    for marginals in ({}, random_marginals((3, 4, 4), per_item=True)):

        def function(scores, marginals=marginals):
            outputs = ck.sinkhorn(scores, **settings, **marginals)
            return tuple(torch.where(x.isfinite(), x, 0.0) for x in outputs)

        assert torch.autograd.gradcheck(function, scores.requires_grad_(), eps=1e-7, atol=1e-4)


def test_reference_gradients_of_large_matrices_with_eps():
    """Beyond the small ones the definition serves eps, and its hand-written gradient."""
    scores = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    for order in ORDERS:
        settings = dict(epsilon=0.6, num_iters=4, order=order, eps=1e-3)
        plan = ck.sinkhorn(scores, gradient="unrolled", **settings)
        weights = torch.randn(plan.shape, dtype=torch.float64)
        found, exact = (
            torch.autograd.grad((x * weights).sum(), scores)[0] for x in (plan, reference.sinkhorn(scores, **settings))
        )
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_gradient_counts_as_zero(backend):
    scores = torch.randn(7, 3, 4, requires_grad=True)
    outputs = ck.sinkhorn(scores, epsilon=0.5, gradient="unrolled", backend=backend, return_potentials=True)
    exact = reference.sinkhorn(scores.double(), epsilon=0.5, return_potentials=True)
    for ours, theirs in zip(outputs, exact):
        found, expected = (torch.autograd.grad(x.square().sum(), scores, retain_graph=True)[0] for x in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_between_forward_and_backward_but_matrices():
    kept = []
    scores = torch.randn(64, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ck.sinkhorn(scores, epsilon=1.0, num_iters=50, gradient="unrolled")
    assert sum(x.numel() for x in kept) <= 2 * scores.numel() + 8


def test_double_backward_is_refused():
    scores = torch.randn(2, 4, 4, requires_grad=True)
    plan = ck.sinkhorn(scores, epsilon=1.0, gradient="unrolled", order="rows_cols", eps=1e-6)
    (gradient,) = torch.autograd.grad(plan.square().sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="sinkhorn has no second derivatives"):
        torch.autograd.grad(gradient.sum(), scores)


# --- as an operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", (0.0, 1e-6))
def test_opcheck(eps):
    scores, a, b = torch.randn(5, 4, 4, requires_grad=True), torch.ones(4), torch.ones(4)
    torch.library.opcheck(FORWARD.default, (scores, a, b, 1.0, 3, None, None, "rows_cols", eps, "unrolled", "cpu", False))
    plan, u, v = (torch.randn(shape) for shape in ((5, 4, 4), (5, 4), (5, 4)))
    gradients = (plan, plan, u, v, 1.0, 3, "rows_cols", eps, "unrolled", "cpu", False)
    torch.library.opcheck(BACKWARD.default, (scores.detach(), a, b, *gradients))


def test_compiles_into_one_graph_for_any_number_of_matrices():
    def step(logits):
        return (
            ck.sinkhorn(logits * 2, epsilon=1.0, num_iters=20, order="rows_cols", eps=1e-6, gradient="unrolled").square().sum()
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for items in (5, 70):
        logits = torch.randn(items, 4, 4, requires_grad=True)
        expected, found = (torch.autograd.grad(function(logits), logits)[0] for function in (step, compiled))
        torch.testing.assert_close(found, expected)


def test_vmap_and_grad_go_through_the_definition():
    scores = torch.randn(6, 4, 4)
    settings = dict(epsilon=1.0, num_iters=5, order="rows_cols", eps=1e-6, gradient="unrolled")
    mapped = torch.func.vmap(lambda x: ck.sinkhorn(x, **settings))(scores)
    torch.testing.assert_close(mapped, ck.sinkhorn(scores, **settings))
    found = torch.func.grad(lambda x: ck.sinkhorn(x, **settings).square().sum())(scores)
    leaf = scores.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(ck.sinkhorn(leaf, **settings).square().sum(), leaf)[0])


# --- hostile and bad inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_item_does_not_depend_on_its_neighbours(backend):
    """One matrix of the batch spans too many bits, one holds NaN: the others' results are theirs alone, to the last bit."""
    scores = torch.randn(40, 4, 4)
    scores[3] *= 200
    scores[17, 2, 1] = torch.nan
    settings = dict(epsilon=1.0, num_iters=3, gradient="unrolled", backend=backend)

    def solve(scores):
        scores = scores.requires_grad_()
        plan = ck.sinkhorn(scores, **settings)
        return plan.detach(), torch.autograd.grad((plan * torch.arange(16.0).view(4, 4)).sum(), scores)[0]

    together = solve(scores)
    for item in (0, 3, 16, 17, 39):
        alone = solve(scores[item : item + 1].detach().clone())
        for found, expected in zip(alone, together):
            torch.testing.assert_close(found[0], expected[item], rtol=0, atol=0, equal_nan=True)
    assert together[0][17].isnan().all() and together[0].isfinite().all((-2, -1)).sum() == 39


def test_result_does_not_depend_on_the_number_of_threads():
    scores, threads, results = torch.randn(3000, 4, 4, requires_grad=True), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            plan = ck.sinkhorn(scores, epsilon=1.0, num_iters=20, gradient="unrolled")
            results.append((plan.detach(), torch.autograd.grad(plan.square().sum(), scores)[0]))
    finally:
        torch.set_num_threads(threads)
    for plan, gradient in results[1:]:
        assert torch.equal(plan, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_any_strides(backend, order):
    whole = torch.randn(6, 9, 16)
    views = (
        whole[:, ::2, 3:12],
        whole.mT,
        whole[0],
        whole.view(2, 3, 9, 16),
        whole[:, :, ::2],
        whole[::2],
        whole[1].expand(5, 9, 16),
    )
    for view in (*views, whole[:1, :4, :4].expand(40, 4, 4), torch.randn(3, 8, 1)[:, ::2].expand(3, 4, 4)):
        leaf, copy = (x.detach().requires_grad_() for x in (view, view.clone(memory_format=torch.contiguous_format)))
        settings = dict(epsilon=0.3, num_iters=2, order=order, gradient="unrolled", backend=backend)
        plans = [ck.sinkhorn(x, **settings) for x in (leaf, copy)]
        assert torch.equal(*plans)
        # An expanded gradient, as that of a sum, is no obstacle either.
        found, expected = (torch.autograd.grad(plan.sum(), x)[0] for plan, x in zip(plans, (leaf, copy)))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_between_the_items_is_not_read(backend):
    scores = torch.full((7, 30), torch.nan)[:, 3:19].unflatten(1, (4, 4))
    scores.copy_(torch.randn(7, 4, 4))
    plan = ck.sinkhorn(scores, epsilon=1.0, backend=backend)
    assert torch.equal(plan, ck.sinkhorn(scores.contiguous(), epsilon=1.0, backend=backend))


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("order", ORDERS)
def test_sides_of_one_and_none(backend, order):
    settings = dict(epsilon=1.0, order=order, backend=backend, gradient="unrolled")
    for shape in ((3, 1, 1), (3, 1, 5), (3, 5, 1), (0, 4, 4), (3, 0, 4), (3, 4, 0)):
        scores = torch.randn(shape, requires_grad=True)
        plan = ck.sinkhorn(scores, **settings)
        (gradient,) = torch.autograd.grad(plan.sum(), scores)
        assert plan.shape == shape and gradient.shape == shape
        if 1 in shape[1:]:  # one row, or one column, can be shared out in one way only
            torch.testing.assert_close(plan.detach(), torch.full(shape, shape[1] / (shape[1] * shape[2])))
            torch.testing.assert_close(gradient, torch.zeros(shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_masked_entries(backend, order):
    """Entries of -inf stay zero; the others as in the definition, though a matrix of little support converges slowly."""
    scores = torch.randn(9, 4, 4)
    scores[:, 0, 1] = scores[:, 2, 3] = -torch.inf
    settings = dict(epsilon=1.0, num_iters=5, order=order)
    plan = ck.sinkhorn(scores, **settings, backend=backend)
    exact, peer = (reference.sinkhorn(x, **settings) for x in (scores.double(), scores))
    assert_within_budget("plan", plan, exact, peer)
    assert (plan[:, 0, 1] == 0).all()


@pytest.mark.parametrize("eps", (0.0, 1e-6))
@pytest.mark.parametrize("order", ORDERS)
def test_a_row_or_column_of_minus_infinity_is_named(order, eps):
    for num_iters in (1, 20):
        settings = dict(epsilon=1.0, num_iters=num_iters, order=order, eps=eps)
        scores = torch.randn(5, 4, 4)
        scores[3, 2] = -torch.inf
        if eps == 0 or order == "rows_cols":  # with eps, entries that are all eps are shared out evenly
            with pytest.raises(ValueError, match=re.escape("scores of row 2 of item [3] are all -inf")):
                ck.sinkhorn(scores, **settings)
        scores = torch.randn(5, 4, 4)
        scores[1, :, 3] = -torch.inf
        if eps == 0 or order == "cols_rows":
            with pytest.raises(ValueError, match=re.escape("scores of column 3 of item [1] are all -inf")):
                ck.sinkhorn(scores, **settings)


@pytest.mark.parametrize("backend", ("definition", "reference", *BACKENDS))
@pytest.mark.parametrize("order", ORDERS)
def test_scores_without_mass_do_not_count_with_eps(order, backend):
    """Of the side that is scaled first, over which the softmax runs: -inf or NaN there gives what any number gives."""
    scores, masked = torch.randn(5, 4, 4), torch.tensor([1.0, 0.0, 1.0, 1.0])
    sides = dict(col_marginals=masked) if order == "cols_rows" else dict(row_marginals=masked)
    sides |= dict(row_marginals=torch.full((4,), 0.75)) if order == "cols_rows" else {}
    place = (..., 1) if order == "cols_rows" else (..., 1, slice(None))
    results = []
    for value in (0.0, -torch.inf, torch.nan, 1e4):
        leaf = scores.clone()
        leaf[place] = value
        leaf.requires_grad_()
        settings = dict(epsilon=1.0, num_iters=3, order=order, eps=1e-6, return_potentials=True, **sides)
        if backend == "definition":
            plan, u, v = reference.sinkhorn(leaf, **settings)
        else:
            plan, u, v = ck.sinkhorn(leaf, gradient="unrolled", backend=backend, **settings)
        (gradient,) = torch.autograd.grad(plan.square().sum(), leaf)
        assert plan.isfinite().all() and (plan[place] == 0).all() and (gradient[place] == 0).all()
        results.append((plan.detach(), u.detach(), v.detach(), gradient))
    for others in results[1:]:
        for numbers, nothing in zip(results[0], others):
            torch.testing.assert_close(nothing, numbers, rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_scores_without_mass_do_not_count_with_eps_beyond_the_small_matrices(order):
    """There is no copy of the scores made for them but in the definition's softmax, and in that of its gradient."""
    scores, masked = torch.randn(2, 40, 40), (torch.arange(40) != 3).float()
    place = (..., 3) if order == "cols_rows" else (..., 3, slice(None))
    side, other = ("col_marginals", "row_marginals") if order == "cols_rows" else ("row_marginals", "col_marginals")
    results = []
    for value in (0.0, -torch.inf):
        leaf = scores.clone()
        leaf[place] = value
        leaf.requires_grad_()
        sides = {side: masked, other: torch.full((40,), 39 / 40)}
        plan = ck.sinkhorn(leaf, epsilon=1.0, order=order, eps=1e-6, gradient="unrolled", **sides)
        results.append((plan.detach(), *torch.autograd.grad(plan.square().sum(), leaf)))
    for numbers, nothing in zip(*results):
        torch.testing.assert_close(nothing, numbers, rtol=0, atol=0)


def test_logits_of_ten_thousand():
    scores = 1e4 * torch.randn(50, 4, 4)
    plan = ck.sinkhorn(scores, epsilon=1.0, num_iters=20)
    exact, peer = (reference.sinkhorn(x, epsilon=1.0, num_iters=20) for x in (scores.double(), scores))
    assert_within_budget("plan", plan, exact, peer)


def test_ten_million_matrices():
    scores = torch.randn(1, 2, 2)
    plan = ck.sinkhorn(scores.expand(10_000_000, 2, 2), epsilon=1.0, num_iters=2)
    assert torch.equal(plan[-1], ck.sinkhorn(scores, epsilon=1.0, num_iters=2)[0])
    assert bool((plan == plan[0]).all())


def test_items_further_apart_than_32_bits_reach(tmp_path):
    """A file of holes stands for 17 GB of scores."""
    file = tmp_path / "scores"
    with open(file, "wb") as empty:
        empty.truncate((2**32 + 16) * 4)
    memory = torch.from_file(str(file), shared=True, size=2**32 + 16, dtype=torch.float32)
    scores = memory.as_strided((3, 4, 4), (2**31, 4, 1))
    scores.copy_(torch.randn(3, 4, 4))
    assert torch.equal(ck.sinkhorn(scores, epsilon=1.0), ck.sinkhorn(scores.clone(), epsilon=1.0))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(order="rows"), "order must be one of ('cols_rows', 'rows_cols'), got 'rows'"),
        (dict(eps=-1e-6), "eps must be finite and not negative, got -1e-06"),
        (dict(eps=torch.nan), "eps must be finite and not negative, got nan"),
        (dict(eps=1e31), "eps must be finite and at most 1.3e+30 in size for arithmetic in float32, got 1e+31"),
        (dict(epsilon=1e-38), "epsilon must be between 7.9e-31 and 1.3e+30 for arithmetic in float32, got 1e-38"),
        (dict(epsilon=1e300), "epsilon must be between 7.9e-31 and 1.3e+30 for arithmetic in float32, got 1e+300"),
        (dict(eps=torch.tensor(1e-6)), "eps must be a number, not a tensor (it receives no gradient)"),
        (dict(eps=1e-6, tol=0.1), "eps=1e-06 keeps sums from their marginals: tol must be None, got 0.1"),
        (dict(eps=1e-6, gradient="implicit"), "eps=1e-06 keeps sums from their marginals: use gradient='unrolled'"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ck.sinkhorn(torch.randn(2, 4, 4), **(dict(epsilon=1.0) | kwargs))


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("shape", [(2, 4, 4), (40, 50)])
def test_extreme_settings_are_right_or_refused(shape, backend):
    """Hot scores share the mass out evenly; NaN comes from none that is taken."""
    scores = torch.randn(shape)
    for epsilon in (1e10, 1e30):
        plan = ck.sinkhorn(scores, epsilon=epsilon, backend=backend)
        torch.testing.assert_close(plan, torch.full_like(scores, 1 / shape[-1]), rtol=1e-5, atol=0)
    assert ck.sinkhorn(scores, epsilon=1e-30, backend=backend).isfinite().all()
    assert ck.sinkhorn(scores.double(), epsilon=1e-300, backend=None if backend == "triton" else backend).isfinite().all()


def test_eps_beyond_the_small_matrices():
    scores = torch.randn(2, 33, 4)
    with pytest.raises(RuntimeError, match=re.escape("the kernels serve eps for matrices of at most 32 x 32, got (2, 33, 4)")):
        ck.sinkhorn(scores, epsilon=1.0, eps=1e-6, backend="cpu")
    torch.testing.assert_close(ck.sinkhorn(scores, epsilon=1.0, eps=1e-6), reference.sinkhorn(scores, epsilon=1.0, eps=1e-6))
