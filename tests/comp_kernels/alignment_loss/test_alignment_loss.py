"""alignment_loss on every backend: the definition's loss and gradient within its own rounding errors, in every mode."""

import pytest
import torch
from test_reference import GOLDEN_SETTINGS, GOLDEN_TARGETS, GOLDEN_TEXT, GOLDEN_VISION

import comp_kernels as ck
from comp_kernels import reference
from comp_kernels.ops.alignment_loss import api, products, streaming
from comp_kernels.testing import ALIGNMENT_CASES, assert_within_budget, make_alignment_inputs

BACKENDS = [name for name in ck.available_backends("alignment_loss", "cpu") if name != "reference"]
# Triton's interpreter takes seconds for what the others do at once.
SLOWLY = [pytest.param(name, marks=pytest.mark.slow) if name == "triton" else name for name in BACKENDS]
MODES = ("sinkhorn", "literal", "released", "softmax")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _narrow_tiles(monkeypatch):
    """The small cases must span several tiles, the last one narrower."""
    monkeypatch.setattr(streaming, "tile_columns", lambda num_rows, dim, num_words, limits: min(256, num_words))


def loss_and_gradient(function, inputs, dtype=None, **kwargs):
    vision, text, prototypes = (x if dtype is None else x.to(dtype) for x in inputs.features)
    vision = vision.detach().requires_grad_()
    loss = function(vision, text, prototypes, prior=inputs.prior, valid=inputs.valid, **kwargs)
    (gradient,) = torch.autograd.grad(loss, vision)
    return loss.detach(), gradient


def check(name, dtype, backend, mode, **kwargs):
    inputs = make_alignment_inputs(ALIGNMENT_CASES[name], dtype)
    settings = dict(mode=mode, epsilon=0.05, temperature=0.05, **kwargs)
    actual = loss_and_gradient(ck.alignment_loss, inputs, backend=backend, **settings)
    exact = loss_and_gradient(reference.alignment_loss, inputs, torch.float64, **settings)
    peer = loss_and_gradient(reference.alignment_loss, inputs, **settings)
    for label, found, truth, plain in zip(("loss", "gradient"), actual, exact, peer):
        assert found.dtype == plain.dtype
        if dtype == torch.float64:
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)
        else:
            # The peer of a single number can be exact by luck.
            assert_within_budget(f"{name} {mode} {label}", found, truth, plain, factor=4.0 if label == "loss" else 2.0)


def test_the_compiled_backend_is_there():
    assert "cpu" in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALIGNMENT_CASES)
def test_matches_the_definition(name, mode, backend):
    check(name, torch.float32, backend, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ("float64", "bfloat16", "float16"))
def test_matches_the_definition_in_every_dtype(dtype, mode):
    check("several_tiles", DTYPES[dtype], "cpu", mode)


KEPT = [(0, 0), (0, 256), (0, 600), (256, 600), (600, 600)]  # columns: of vision and text scores, of text scores


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ("sinkhorn", "literal"))
def test_memory_budget_does_not_change_the_result(kept, backend, mode, monkeypatch):
    """Scores computed again, kept in part, kept for text only, kept for both."""
    monkeypatch.setattr(streaming, "kept_columns", lambda *sizes: kept)
    check("several_tiles", torch.float32, backend, mode, num_iters=4)


def test_what_is_kept_fits_its_share():
    """Of what the plain version takes, in elements; scores of tiles that are not kept count."""
    for rows, words, dim in ((1, 300, 8), (256, 151936, 896), (256, 49152, 576), (2048, 49152, 576), (2048, 151936, 896)):
        both, text = streaming.kept_columns(rows, dim, words, 1024, 5000, 1 / 8)
        kept = rows * (both + text) + (0 if both == words else 2 * rows * 1024 + 5000)
        assert 0 <= both <= text <= words
        assert kept <= (words * dim + 5 * rows * words) / (8 if rows >= 2048 else 4) or both == text == 0
    assert streaming.kept_columns(256, 896, 151936, 8192, 0, 1 / 8) == (151936, 151936)
    assert streaming.kept_columns(0, 8, 300, 1024, 0, 1 / 8) == (300, 300)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
@pytest.mark.parametrize("intel", (False, True))
def test_onednn_multiplies_where_the_blas_stays_with_avx2(intel, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "is_intel", lambda: intel)
    chosen = products.choose_products(torch.zeros(3, 8), 2, torch.float32, torch.float32, False, on_gpu=False)
    assert type(chosen) is (products.Matmul if intel else products.OneDnn)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("view", (False, True))
def test_products_of_onednn(dtype, view, monkeypatch):
    """Parts of the channels, widened prototypes, prototypes with gaps between their rows."""
    monkeypatch.setattr(products, "ONEDNN_OPERATIONS", 0)
    monkeypatch.setattr(products, "ONEDNN_CHANNELS", 20)
    prototypes = torch.randn(300, 56 if view else 48).to(DTYPES[dtype])[:, :48]
    features, score_gradients = torch.randn(14, 48), torch.randn(1, 14, 300)
    onednn, exact = products.OneDnn(prototypes, 7, torch.float32), prototypes.double()
    for columns in (slice(0, 256), slice(256, 300)):
        found, plain = torch.empty(14, columns.stop - columns.start), features @ prototypes[columns].float().T
        onednn.scores(features, columns, found)
        assert_within_budget("scores", found, features.double() @ exact[columns].T, plain)
        few = score_gradients[:, :, columns].contiguous()
        found, plain = torch.ones(1, 14, 48), few[0] @ prototypes[columns].float()
        onednn.add_gradient(few, columns, found, first=True)
        onednn.add_gradient(few, columns, found, first=False)
        assert_within_budget("gradient", found[0], 2 * (few[0].double() @ exact[columns]), 2 * plain)
    found = torch.empty(300, 48)
    onednn.prototype_gradient(score_gradients, features, found)
    expected = score_gradients[0].T @ features
    assert_within_budget("of prototypes", found, score_gradients[0].T.double() @ features.double(), expected)


def test_products_with_widened_prototypes(monkeypatch):
    """In three parts; the gradient begins with the one that the scores widened last."""
    monkeypatch.setitem(products.WIDE_ELEMENTS, "cpu", 256 * 24)
    prototypes, features = torch.randn(700, 24).half(), torch.randn(10, 24).double()
    matmul, wide = products.Matmul(prototypes, 5, torch.float64), prototypes.double()
    scores = torch.full((10, 900), torch.nan).double()[:, :700]
    matmul.scores(features, slice(0, 700), scores)
    torch.testing.assert_close(scores, features @ wide.T)
    assert matmul.widened[0] == slice(512, 700)
    prototypes[512:] = 0  # not read again
    found = torch.full((1, 5, 24), torch.nan).double()
    matmul.add_gradient(scores[None, :5], slice(0, 700), found, first=True)
    torch.testing.assert_close(found[0], scores[:5] @ wide)
    prototypes[:] = wide
    matmul.add_gradient(scores[None, 5:, 16:300], slice(16, 300), found, first=False)
    torch.testing.assert_close(found[0], scores[:5] @ wide + scores[5:, 16:300] @ wide[16:300])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("backend", SLOWLY)
def test_gradient_of_prototypes(backend, dtype, mode):
    inputs = make_alignment_inputs(ALIGNMENT_CASES["several_tiles"], DTYPES[dtype])
    settings = dict(mode=mode, epsilon=0.05, temperature=0.05, prior=inputs.prior, valid=inputs.valid, prototype_gradient=True)

    def gradients(function, dtype, **backend):
        vision, text, prototypes = (x.to(dtype).requires_grad_() for x in inputs.features)
        loss = function(vision, text, prototypes, **settings, **backend)
        return torch.autograd.grad(loss, (vision, prototypes))

    found = gradients(ck.alignment_loss, DTYPES[dtype], backend=backend)
    exact = gradients(reference.alignment_loss, torch.float64)
    plain = gradients(reference.alignment_loss, DTYPES[dtype])
    for name, *triple in zip(("vision", "prototypes"), found, exact, plain):
        assert_within_budget(name, *triple)


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="they are the Triton backend's, and triton is not installed")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "words, features", [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("float16", "float16")]
)
def test_products_of_16_bits(words, features, mode, monkeypatch):
    """As on a GPU: features as they came or as a sum of terms, float32 results, within the budget of float32 products."""
    chosen = []

    def choose(prototypes, rows, dtype, features_dtype, prototype_gradient, on_gpu):
        chosen.append(products.Half(prototypes, rows, dtype, features_dtype))
        return chosen[-1]

    monkeypatch.setattr(streaming, "choose_products", choose)
    inputs = make_alignment_inputs(ALIGNMENT_CASES["several_tiles"], torch.float64)
    vision, text = (x.to(DTYPES[features]) for x in inputs.features[:2])
    inputs.features = (vision, text, inputs.features[2].to(DTYPES[words]))
    for normalize, temperature in ((True, 0.05), (False, 5.0)):
        settings = dict(mode=mode, epsilon=temperature, temperature=temperature, normalize=normalize)
        found = loss_and_gradient(ck.alignment_loss, inputs, backend="triton", **settings)
        exact = loss_and_gradient(reference.alignment_loss, inputs, torch.float64, **settings)
        plain = loss_and_gradient(reference.alignment_loss, inputs, **settings)
        assert (chosen[-1].raw, chosen[-1].terms) == ((True, 1) if words == features else (False, 3))
        assert_within_budget("loss", found[0], exact[0], plain[0], factor=4.0)
        assert_within_budget("gradient", found[1], exact[1], plain[1])


@pytest.mark.parametrize("mode", MODES)
def test_plain_products(mode):
    check("several_tiles", torch.float32, "cpu", mode, normalize=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", GOLDEN_TARGETS)
def test_golden_values(mode, backend):
    vision, text = torch.tensor(GOLDEN_VISION, requires_grad=True), torch.tensor(GOLDEN_TEXT)
    target = torch.tensor(GOLDEN_TARGETS[mode])
    prediction = (vision / 0.05).softmax(-1)
    loss = ck.alignment_loss(vision, text, torch.eye(5), mode=mode, backend=backend, **GOLDEN_SETTINGS)
    assert abs(loss - -(target * prediction.log()).sum(-1).mean()) < 3e-6
    (gradient,) = torch.autograd.grad(loss, vision)
    torch.testing.assert_close(gradient, ((prediction - target) / 0.05 / 3).detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_finite_at_cosine_one_and_invalid_rows_do_not_exist(mode, backend):
    prototypes = torch.randn(50, 8)
    vision, text = prototypes[:6].clone(), prototypes[:6].clone()
    vision[5], text[5] = torch.nan, torch.nan
    valid = torch.arange(6) < 5
    vision.requires_grad_()
    for epsilon in (0.005, 0.001):
        settings = dict(mode=mode, epsilon=epsilon, temperature=epsilon, backend=backend)
        loss = ck.alignment_loss(vision, text, prototypes, valid=valid, **settings)
        (gradient,) = torch.autograd.grad(loss, vision)
        assert loss.isfinite() and gradient.isfinite().all() and (gradient[5] == 0).all()
        alone = ck.alignment_loss(vision[:5], text[:5], prototypes, **settings)
        # Exponents near log2(e) / 0.001 = 1,443 bits are rounded by 6e-5 bits, which moves a probability by 4e-5.
        torch.testing.assert_close(loss, alone, rtol=4e-5, atol=0)
    nothing = ck.alignment_loss(vision, text, prototypes, mode=mode, valid=torch.zeros(6, dtype=torch.bool), backend=backend)
    nothing.backward()
    assert nothing == 0 and (vision.grad == 0).all()


def test_single_exponents_beyond_the_range():
    """Text that stands by prototypes of its own: cosines of 0.7 are 200 bits at epsilon 0.005, all others, such as those of the
    three rows by which it is judged whether a shift is needed, are few."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(400, 4096, generator=generator)
    vision, text = (torch.randn(30, 4096, generator=generator) for _ in range(2))
    text[1:15] += prototypes[301:315]
    settings = dict(mode="sinkhorn", num_iters=1)
    exact = reference.alignment_loss(vision.double(), text.double(), prototypes.double(), **settings)
    peer = reference.alignment_loss(vision, text, prototypes, **settings)
    assert_within_budget(
        "loss", ck.alignment_loss(vision, text, prototypes, **settings, backend="cpu"), exact, peer, factor=4.0
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("mode", ["softmax", "literal"])
@pytest.mark.parametrize("size", [1e6, 1e9, 1e12])
def test_products_of_any_size(size, mode, backend):
    """Beyond 2^32 bits a maximum in float32 is rounded by hundreds of them. Unlike cosines, products may be so large."""
    vision, text, prototypes = torch.randn(20, 16) * size, torch.randn(20, 16) * size, torch.randn(600, 16)
    leaves = [vision.double().requires_grad_(), vision.requires_grad_()]
    settings = dict(mode=mode, normalize=False)
    exact = reference.alignment_loss(leaves[0], text.double(), prototypes.double(), **settings)
    loss = ck.alignment_loss(leaves[1], text, prototypes, backend=backend, **settings)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(x, leaf)[0].float() for x, leaf in zip((exact, loss), leaves)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("mode", MODES)
def test_the_lowest_temperatures(mode, backend):
    """Those from which cosines are told apart are right, and NaN comes from none that is taken."""
    vision, text, prototypes = torch.randn(5, 16), torch.randn(5, 16), torch.randn(40, 16)
    exact = reference.alignment_loss(vision.double(), text.double(), prototypes.double(), mode=mode, temperature=2e-7)
    loss = ck.alignment_loss(vision, text, prototypes, mode=mode, temperature=2e-7, backend=backend)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-4, atol=0)
    for name in ("epsilon", "prior_temperature"):
        assert ck.alignment_loss(vision, text, prototypes, mode=mode, backend=backend, **{name: 2e-7}).isfinite()
        assert ck.alignment_loss(vision, text, prototypes, mode=mode, backend=backend, **{name: 1e30}).isfinite()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_without_direction_receives_no_gradient(mode, backend):
    """Its cosines are 0, and the other rows are what they are without it; a short row with a direction keeps its gradient."""
    vision, text, prototypes = (torch.randn(n, 8) for n in (5, 5, 50))
    vision[2], vision[3] = 0.0, vision[3] * 1e-6
    vision.requires_grad_()
    others = torch.arange(5) != 2
    settings = dict(mode=mode, epsilon=0.05, temperature=0.05, backend=backend)
    loss = ck.alignment_loss(vision, text, prototypes, **settings)
    (gradient,) = torch.autograd.grad(loss, vision)
    assert loss.isfinite() and (gradient[2] == 0).all() and (gradient[others].norm(dim=1) > 0).all()
    if mode != "sinkhorn":  # whose targets are made for all rows together
        loss = ck.alignment_loss(vision, text, prototypes, valid=others, **settings)
        (expected,) = torch.autograd.grad(loss, vision)
        torch.testing.assert_close(gradient * 5, expected * 4, rtol=1e-5, atol=0)


def test_gradcheck():
    inputs = make_alignment_inputs(ALIGNMENT_CASES["small"], torch.float64)
    vision, text, prototypes = inputs.features
    for mode in MODES:
        assert torch.autograd.gradcheck(
            lambda vision, mode=mode: ck.alignment_loss(
                vision, text, prototypes, mode=mode, epsilon=0.3, temperature=0.3, valid=inputs.valid, backend="cpu"
            ),
            vision.requires_grad_(),
            fast_mode=True,
        )


def test_only_vision_receives_a_gradient():
    vision, text, prototypes = (torch.randn(n, 8, requires_grad=True) for n in (4, 4, 30))
    ck.alignment_loss(vision, text, prototypes).backward()
    assert vision.grad is not None and text.grad is None and prototypes.grad is None
    with torch.no_grad():
        assert not ck.alignment_loss(vision, text, prototypes).requires_grad


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_autocast_changes_nothing(backend):
    vision, text, prototypes = (torch.randn(n, 16) for n in (4, 4, 100))
    expected = ck.alignment_loss(vision, text, prototypes, epsilon=0.05, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ck.alignment_loss(vision, text, prototypes, epsilon=0.05, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ("sinkhorn", "literal", "released"))
def test_a_prior_that_is_no_number_reaches_the_loss(mode, monkeypatch):
    """Where counts are not looked at, in a compiled graph, NaN must not end as a loss of zero."""
    monkeypatch.setattr(api, "readable", lambda x: False)
    vision, text, prototypes = (torch.randn(n, 8) for n in (4, 4, 30))
    for count in (torch.nan, torch.inf):
        prior = torch.ones(30).index_fill(0, torch.tensor([3, 7]), count)
        for backend in ("reference", *BACKENDS):
            assert ck.alignment_loss(vision, text, prototypes, prior=prior, mode=mode, backend=backend).isnan(), backend


@pytest.mark.parametrize("backend", ["reference", *SLOWLY])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", (True, False))
def test_nan_reaches_the_loss(mode, normalize, backend):
    """Wherever it is, one entry or all: a check for losses that are not finite has to see it."""
    for which in range(3):
        for rows, columns in ((slice(1, 2), slice(2, 3)), (slice(None), slice(None))):
            for value in (torch.nan, torch.inf):
                features = [torch.randn(n, 8) for n in (5, 5, 300)]
                features[which][rows, columns] = value
                vision = features[0].requires_grad_()
                loss = ck.alignment_loss(vision, *features[1:], mode=mode, normalize=normalize, backend=backend)
                (gradient,) = torch.autograd.grad(loss, vision)
                assert loss.isnan() and not gradient.isfinite().all(), (which, rows, value)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(torch.float32, (2.0**63, 2.0**100, 2.0**124, 2.0**-26)), (torch.float64, (2.0**511, 2.0**530, 2.0**800, 2.0**1020))],
    ids=str,
)
def test_squares_beyond_the_range(dtype, scales, mode, backend):
    """Directions do not depend on lengths, 1e30 or 1e-8."""
    vision, text, prototypes = (torch.randn(n, 8, dtype=dtype).clamp(-4, 4) for n in (5, 5, 300))
    settings = dict(mode=mode, epsilon=0.05, temperature=0.05, backend=backend)
    expected = ck.alignment_loss(vision, text, prototypes, **settings)
    for scale in scales:
        scaled = [
            x.index_fill(0, torch.tensor(1), 0.0).index_add(0, torch.tensor([1]), x[1:2] * scale)
            for x in (vision, text, prototypes)
        ]
        torch.testing.assert_close(ck.alignment_loss(*scaled, **settings), expected)


def test_prototypes_without_a_gradient_are_not_held():
    """They may change before the backward pass, or be of inference mode."""
    vision, text, prototypes = (torch.randn(rows, 8, requires_grad=rows == 4) for rows in (4, 4, 30))
    loss = ck.alignment_loss(vision, text, prototypes)
    (expected,) = torch.autograd.grad(loss, vision)
    with torch.inference_mode():
        frozen = prototypes.clone()
    (gradient,) = torch.autograd.grad(ck.alignment_loss(vision, text, frozen), vision)
    assert torch.equal(gradient, expected)
    loss = ck.alignment_loss(vision, text, prototypes)
    prototypes.zero_()
    assert torch.equal(torch.autograd.grad(loss, vision)[0], expected)


def test_refuses_what_does_not_fit():
    features, prototypes = torch.randn(4, 8), torch.randn(30, 8)
    with pytest.raises(ValueError, match="num_iters must be at least 1, got 0"):
        ck.alignment_loss(features, features, prototypes, num_iters=0)
    with pytest.raises(ValueError, match="prototypes is float64 but vision is"):
        ck.alignment_loss(features, features, prototypes.double())


def test_double_backward_is_refused():
    vision, text, prototypes = (torch.randn(n, 8) for n in (4, 4, 30))
    vision.requires_grad_()
    (gradient,) = torch.autograd.grad(ck.alignment_loss(vision, text, prototypes, backend="cpu"), vision, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


# --- as an operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("sinkhorn", "released"))
def test_opcheck(mode):
    vision, text, prototypes = (torch.randn(n, 8) for n in (4, 4, 30))
    arguments = (vision.requires_grad_(), text, prototypes, torch.randint(0, 9, (30,)), torch.arange(4) < 3)
    settings = (mode, 0.05, 0.05, 3, 0.05, True, None, True, False, "cpu", False)
    torch.library.opcheck(torch.ops.comp_kernels.alignment_loss.default, (*arguments, *settings))


def test_compiles_into_one_graph():
    vision, text, prototypes = (torch.randn(n, 8) for n in (4, 4, 30))
    vision.requires_grad_()

    def function(vision):
        return ck.alignment_loss(vision * 2, text, prototypes, epsilon=0.1, valid=torch.arange(4) < 3, normalize=False)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(vision), vision)
    (found,) = torch.autograd.grad(compiled(vision), vision)
    torch.testing.assert_close(found, expected)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    vision, text, prototypes = (torch.randn(n, 8) for n in (4, 4, 30))
    with FlopCounterMode(display=False) as counter:
        ck.alignment_loss(vision.requires_grad_(), text, prototypes, backend="cpu")
    assert counter.get_total_flops() == 3 * 2 * 4 * 30 * 8


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(mode="optimal"), "mode must be one of"),
        (dict(prior=torch.ones(29)), r"prior must have one count per prototype, \(30,\), got \(29,\)"),
        (dict(prior=[1.0] * 30), r"prior must be a tensor \[V\], one count per prototype, got list"),
        (dict(prior=torch.ones(30, dtype=torch.complex64)), "prior must be real, got torch.complex64"),
        (dict(prior=torch.ones(30, dtype=torch.uint16)), "prior must not be torch.uint16, .*: pass prior.to"),
        (dict(prior=torch.full((30,), -1.0)), "prior must hold counts that are not negative, with a finite sum"),
        (dict(prior=torch.full((30,), torch.nan)), "got a minimum of nan"),
        (dict(prior=torch.full((30,), 3e38)), "and a sum of inf"),
        (dict(prior=torch.zeros(30), mode="released"), "prior must have a positive sum in mode 'released'"),
        (dict(valid=[True] * 4), r"valid must be a tensor \[n\] of bool, got list"),
        (dict(temperature=torch.tensor(0.1, requires_grad=True)), "temperature must be a number, not a tensor"),
        (dict(epsilon=None), "epsilon must be a number, not a tensor .* got NoneType None"),
        (dict(num_iters=1.5), "num_iters must be an integer, got float 1.5"),
        (dict(group="world"), "group must be a torch.distributed.ProcessGroup or None"),
        (dict(valid=torch.ones(4)), r"valid must be bool \(4,\)"),
        (dict(temperature=-1.0), "temperature must be positive, got -1.0"),
        (dict(temperature=1e-9), r"temperature must be between 1.2e-07 and 1.3e\+30 for cosines in float32, got 1e-09"),
        (dict(epsilon=1e-9), r"epsilon must be between 1.2e-07 and 1.3e\+30 for cosines in float32, got 1e-09"),
        (
            dict(temperature=1e-40, normalize=False),
            r"temperature must be between 7.9e-31 and 1.3e\+30 for arithmetic in float32",
        ),
        (dict(prior_temperature=1e300), r"prior_temperature must be between .* for arithmetic in float32, got 1e\+300"),
        (dict(text=torch.ones(3, 8)), r"text must have the shape of vision \(4, 8\), got \(3, 8\)"),
        (dict(prototypes=torch.ones(30, 9)), r"prototypes must be \[V, 8\] to match vision"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    arguments = dict(vision=torch.ones(4, 8), text=torch.ones(4, 8), prototypes=torch.ones(30, 8))
    with pytest.raises(ValueError, match=message):
        ck.alignment_loss(**{**arguments, **kwargs})
