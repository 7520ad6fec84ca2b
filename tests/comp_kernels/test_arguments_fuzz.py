"""Arguments that nobody thought of: every operator gives what its definition gives, or refuses by name where that refuses.

Values are drawn by a seed, shapes, strides, dtypes and settings by hypothesis. Truth is the reference in float64; in narrower
dtypes the budget is what plain PyTorch errs.
"""

import numpy as np
import pytest
import torch
from fuzzing import budget
from hypothesis import given, note
from hypothesis import strategies as st

import comp_kernels as ck
from comp_kernels.testing import check_places, cumulative, error_and_allowance

pytestmark = pytest.mark.slow

BACKEND = "cpu"  # the interpreter of Triton takes seconds per call
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(FLOATS)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_view(x, kind):
    """The same numbers with other strides."""
    if kind == "slice":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 2 : 2 + x.shape[-1]] = x
        return wide[..., 2 : 2 + x.shape[-1]]
    if kind == "steps":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if kind == "turned" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


views = st.sampled_from(["plain", "plain", "slice", "steps", "turned"])


def leaves_of(arguments, names):
    return {name: arguments[name] for name in names if isinstance(arguments.get(name), torch.Tensor)}


def values_and_gradients(function, arguments, names, seed, **settings):
    """Results, and gradients for cotangents drawn by `seed`, by name; a result that has none (a constant) gives none."""
    arguments = arguments | {name: x.detach().requires_grad_() for name, x in leaves_of(arguments, names).items()}
    results = function(**arguments, **settings)
    results = results if isinstance(results, tuple) else (results,)
    found = {f"result {i}": x.detach() for i, x in enumerate(results)}
    differentiable = [x for x in results if x.requires_grad]
    if differentiable:
        cotangents = [
            torch.where(x.isfinite(), normal(seed + i, *x.shape).to(x.dtype), 0) for i, x in enumerate(differentiable)
        ]
        leaves = leaves_of(arguments, names)
        gradients = torch.autograd.grad(differentiable, list(leaves.values()), cotangents, allow_unused=True)
        found |= {f"d {name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), gradients)}
    return found


def in_float64(arguments):
    return {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in arguments.items()}


def check_against_the_definition(function, arguments, names, seed, dtype, exponent):
    """The compiled backend against the reference: in float64 to rounding, else within the budget of the reference in `dtype`.

    exponent: the largest that is taken; it is rounded before, and what comes of it errs by that, relatively.
    """
    note({k: (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()})
    actual = values_and_gradients(function, arguments, names, seed, backend=BACKEND)
    exact = values_and_gradients(function, in_float64(arguments), names, seed, backend="reference")
    assert actual.keys() == exact.keys()
    peer = exact if dtype == torch.float64 else values_and_gradients(function, arguments, names, seed, backend="reference")
    largest = max((float(x[x.isfinite()].abs().max()) for x in exact.values() if x.isfinite().any()), default=0.0)
    for name, found in actual.items():
        assert found.shape == exact[name].shape and found.dtype == peer[name].dtype, name
        if dtype == torch.float64:
            torch.testing.assert_close(found, exact[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        elif found.numel():
            check_places(name, found, exact[name], peer[name])
            error, allowed = error_and_allowance(found, exact[name], peer[name])
            # In one draw of a few values the peer may be exact by luck: what it may err counts as well as what it does.
            allowed += torch.finfo(dtype).eps * max(1.0, exponent) * max(1.0, largest)
            assert error <= 2 * allowed, f"{name}: max error {error:.3e} exceeds the budget {2 * allowed:.3e}"


def length(x, dim=-1):
    """The longest row of the finite part of x."""
    x = torch.where(x.isfinite(), x, 0).double()
    return float(x.norm(dim=dim).max()) if x.numel() else 0.0


# --- rope_attention ----------------------------------------------------------------------------------------------------------


@st.composite
def attention_calls(draw):
    """(arguments, seed, dtype): packed or not, cross attention, tables of every width, views, slack of NaN."""
    seed, dtype = draw(seeds), draw(dtypes)
    lengths = draw(st.lists(st.integers(0, 9) | st.sampled_from([16, 33, 65]), max_size=4))
    packed, cross = draw(st.booleans()), draw(st.booleans())
    lengths_k = draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths))) if cross else lengths
    slack = draw(st.integers(0, 2)) if packed else 0
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(0, 3))
    dim = draw(st.integers(1, 10).map(lambda half: 2 * half) | st.sampled_from([64, 72]))  # odd ones are the reference's alone
    heads, tokens, tokens_k = kv_heads * group, sum(lengths) + slack, sum(lengths_k) + slack
    q, k, v = (
        normal(seed, tokens, heads, dim),
        normal(seed + 1, tokens_k, kv_heads, dim),
        normal(seed + 2, tokens_k, kv_heads, dim),
    )
    if slack:
        for x, used in ((q, lengths), (k, lengths_k), (v, lengths_k)):
            x[sum(used) :] = torch.nan
    arguments = {name: as_view(x.to(dtype), draw(views)) for name, x in (("q", q), ("k", k), ("v", v))}
    if packed:
        arguments["cu_seqlens"] = cumulative(lengths, draw(st.sampled_from([torch.int32, torch.int64])))
        if cross:
            arguments["cu_seqlens_k"] = cumulative(lengths_k, draw(st.sampled_from([torch.int32, torch.int64])))
    if draw(st.booleans()):
        arguments |= draw(tables(seed, tokens, tokens_k, heads, kv_heads, dim, dtype, needed=cross or group != 1))
    if draw(st.booleans()):
        arguments["scale"] = draw(st.sampled_from([0.0, -0.5, 1, 3.0, np.float32(0.25)]))
    arguments["return_lse"] = draw(st.booleans())
    return arguments, seed, dtype


@st.composite
def tables(draw, seed, tokens, tokens_k, heads, kv_heads, most, dtype, needed):
    """cos and sin, and those of the keys where the queries' do not fit; any numbers, not only rotations."""
    rotary = draw(st.integers(1, most // 2)) * 2
    strides = [p for p in range(1, rotary // 2 + 1) if rotary % (2 * p) == 0]
    kind = torch.float64 if dtype == torch.float64 else draw(st.sampled_from([torch.float32, dtype]))
    widths, per_head = draw(st.tuples(*[st.sampled_from([rotary, rotary // 2])] * 2)), draw(st.booleans())
    keys = needed or draw(st.booleans())
    result = dict(rotary_dim=rotary, pair_stride=draw(st.sampled_from(strides)))
    sides = [("", tokens, heads, widths[0])] + ([("_k", tokens_k, kv_heads, widths[1])] if keys else [])
    for i, (suffix, rows, number, width) in enumerate(sides):
        shape = (rows, number, width) if per_head else (rows, width)
        for j, name in enumerate(("cos", "sin")):
            result[name + suffix] = as_view(normal(seed + 10 + 2 * i + j, *shape).to(kind), draw(views))
    return result


TABLES = (("cos", "sin"), ("cos_k", "sin_k"))


@budget(250)
@given(call=attention_calls())
def test_rope_attention(call):
    arguments, seed, dtype = call
    names = ("q", "k", "v", "cos", "sin", "cos_k", "sin_k")
    turned = [length(torch.stack((arguments[c], arguments[s])), dim=0) if c in arguments else 1.0 for c, s in TABLES]
    logit = abs(arguments.get("scale", 1.0)) * length(arguments["q"]) * length(arguments["k"]) * turned[0] * max(turned)
    check_against_the_definition(ck.rope_attention, arguments, names, seed, dtype, logit)


# --- sinkhorn ----------------------------------------------------------------------------------------------------------------


@st.composite
def transport_calls(draw):
    """(arguments, seed, dtype): batches, zero marginals, scores of -inf, every gradient.

    The implicit gradient is that of a converged plan, of the plan alone (potentials are known up to a constant).
    """
    seed, dtype = draw(seeds), draw(dtypes)
    batch = draw(st.sampled_from([(), (), (1,), (2,), (2, 3), (0,)]))
    rows, cols = draw(st.integers(1, 7)), draw(st.integers(1, 9) | st.sampled_from([63, 65, 130]))
    gradient = draw(st.sampled_from(["detach", "unrolled", "implicit"]))
    scores = normal(seed, *batch, rows, cols) * (0.2 if gradient == "implicit" else draw(st.sampled_from([0.1, 1.0, 30.0])))
    if gradient != "implicit" and draw(st.integers(0, 3)) == 0:  # one of a row and one of a column stay
        holes = normal(seed + 1, *batch, rows, cols) > 0.5
        holes[..., 0], holes[..., 0, :] = False, False
        scores = scores.masked_fill(holes, -torch.inf)
    arguments = dict(
        scores=as_view(scores.to(dtype), draw(views)),
        epsilon=draw(st.sampled_from([0.5, 1, 3.0] if gradient == "implicit" else [0.05, 0.5, 1, 3.0, np.float64(0.25)])),
        num_iters=300 if gradient == "implicit" else draw(st.integers(1, 6)),
        gradient=gradient,
        return_potentials=gradient != "implicit" and draw(st.booleans()),
    )
    kind = torch.promote_types(dtype, torch.float32)
    marginals = {
        name: normal(seed + 2 + i, *draw(st.sampled_from([(), batch])), size).abs() + 0.1
        for i, (name, size) in enumerate((("row_marginals", rows), ("col_marginals", cols)))
        if draw(st.booleans())
    }
    for name, marginal in marginals.items():
        if draw(st.booleans()) and marginal.shape[-1] > 1:
            marginal[..., -1] = 0
        wanted = float(rows) if name == "col_marginals" and "row_marginals" not in marginals else 1.0
        arguments[name] = (marginal / marginal.sum(-1, keepdim=True) * wanted).to(kind)
    return arguments, seed, dtype


@budget(250)
@given(call=transport_calls())
def test_sinkhorn(call):
    arguments, seed, dtype = call
    scores = torch.where(arguments["scores"].isfinite(), arguments["scores"], 0)
    exponent = float(scores.abs().max()) / arguments["epsilon"] if scores.numel() else 0.0
    check_against_the_definition(ck.sinkhorn, arguments, ("scores",), seed, dtype, exponent)


# --- alignment_loss ----------------------------------------------------------------------------------------------------------


@st.composite
def alignment_calls(draw):
    """(arguments, seed, dtype): every mode, rows that do not count, rows of zeros, counts of any kind, views."""
    seed, dtype = draw(seeds), draw(dtypes)
    rows, dim, words = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 9) | st.sampled_from([65, 300]))
    vision, text, prototypes = normal(seed, rows, dim), normal(seed + 1, rows, dim), normal(seed + 2, words, dim)
    if draw(st.booleans()):
        text[0] = 0
    features = dict(vision=vision, text=text, prototypes=prototypes)
    arguments = {name: as_view(x.to(dtype), draw(views)) for name, x in features.items()}
    if draw(st.booleans()):
        counts = normal(seed + 3, words).abs() * 5 + 1
        arguments["prior"] = counts.to(draw(st.sampled_from([torch.int64, torch.int32, torch.float32])))
    if draw(st.booleans()):
        arguments["valid"] = normal(seed + 4, rows) > draw(st.sampled_from([0.0, 9.0]))
    arguments |= dict(
        mode=draw(st.sampled_from(["sinkhorn", "literal", "released", "softmax"])),
        epsilon=draw(st.sampled_from([0.05, 0.5, 1])),
        temperature=draw(st.sampled_from([0.05, 0.5, 1])),
        num_iters=draw(st.integers(1, 4)),
        normalize=draw(st.booleans()),
    )
    return arguments, seed, dtype


BOTH = ("vision", "text")


@budget(250)
@given(call=alignment_calls())
def test_alignment_loss(call):
    arguments, seed, dtype = call
    products = [1.0, 1.0] if arguments["normalize"] else [length(arguments[x]) * length(arguments["prototypes"]) for x in BOTH]
    exponent = max(x / arguments[t] for x, t in zip(products, ("temperature", "epsilon")))
    check_against_the_definition(ck.alignment_loss, arguments, ("vision",), seed, dtype, exponent)


# --- what is no argument -----------------------------------------------------------------------------------------------------

CALLS = {
    ck.rope_attention: dict(
        q=normal(0, 5, 4, 8).float(),
        k=normal(1, 5, 2, 8).float(),
        v=normal(2, 5, 2, 8).float(),
        cos=normal(3, 5, 8).float(),
        sin=normal(4, 5, 8).float(),
        cu_seqlens=torch.tensor([0, 2, 5]),
        cu_seqlens_k=torch.tensor([0, 2, 5]),
        cos_k=normal(5, 5, 8).float(),
        sin_k=normal(6, 5, 8).float(),
        rotary_dim=8,
        pair_stride=4,
        scale=0.5,
    ),
    ck.sinkhorn: dict(
        scores=normal(0, 4, 6).float(),
        epsilon=0.5,
        num_iters=3,
        row_marginals=torch.full((4,), 1.5),
        col_marginals=torch.ones(6),
        tol=None,
        gradient="detach",
    ),
    ck.alignment_loss: dict(
        vision=normal(0, 4, 6).float(),
        text=normal(1, 4, 6).float(),
        prototypes=normal(2, 9, 6).float(),
        prior=torch.arange(1, 10),
        mode="sinkhorn",
        epsilon=0.5,
        temperature=0.5,
        num_iters=3,
        prior_temperature=0.5,
        valid=torch.tensor([True, True, False, True]),
        normalize=True,
    ),
}
SETTINGS = [
    None,
    "x",
    "",
    b"x",
    -1,
    0,
    1,
    2,
    3,
    6,
    8,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e-300,
    1e300,
    2**70,
    -(2**70),
]
SETTINGS += [True, [], {}, (1, 2), object, np.float32(0.5), np.int64(2), np.array(2.0), np.array([2]), 2 + 0j]


def spoiled(x):
    """What may come instead of a tensor."""
    made = [None, 1.0, "x", [1.0], np.ones((4, 6)), torch.tensor(1.0), torch.ones(0), torch.ones(3), torch.ones(5, 4, 8).int()]
    made += [
        x.numpy(),
        x.tolist(),
        x.to(torch.bool),
        x.to(torch.int64),
        x.to(torch.int8),
        x.to(torch.complex64),
        x.double(),
        x.half(),
    ]
    made += [
        x.to("meta"),
        x.to_sparse(),
        x[:0],
        x[..., :0],
        x[:-1],
        x[..., :-1],
        x[None],
        x.flip(0),
        x * -1,
        x * 1e30,
        x.T if x.dim() == 2 else x,
    ]
    made += [torch.full_like(x, fill) for fill in (0, 1, 127)]
    if x.is_floating_point():
        made += [torch.full_like(x, fill) for fill in (torch.nan, torch.inf, -torch.inf, 3e38)]
        made += [x.to(torch.float8_e4m3fn)]
    if not x.is_floating_point() and x.dtype != torch.bool:
        made += [x + 2**40, x - 3, torch.cat((x, x)), x.to(torch.uint8), x.to(torch.uint32)]
    return made


@st.composite
def spoiled_calls(draw):
    """An operator, and which of its arguments is replaced by which of its choices."""
    function = draw(st.sampled_from(list(CALLS)))
    names = draw(st.lists(st.sampled_from(list(CALLS[function])), min_size=1, max_size=2, unique=True))
    return function, {name: draw(st.integers(0, len(choices_for(CALLS[function][name])) - 1)) for name in names}


def choices_for(value):
    return spoiled(value) if isinstance(value, torch.Tensor) else SETTINGS


def outcome(function, arguments, backend):
    """The results, or the refusal; any other exception is a fault and goes through."""
    try:
        results = function(**arguments, backend=backend)
    except ValueError as error:
        return str(error)
    return results if isinstance(results, tuple) else (results,)


def beyond_precision(arguments):
    """Whether exponents are so large that their rounding alone decides; then every value is as good as any other."""
    numbers = [x.double() for x in arguments.values() if isinstance(x, torch.Tensor) and not x.is_meta and not x.is_complex()]
    extreme = [x for x in arguments.values() if isinstance(x, float | int) and x and not 1e-3 < abs(x) < 1e30]
    return bool(extreme) or any(x.numel() and bool((x[x.isfinite()].abs() > 1e4).any()) for x in numbers)


@budget(900)
@given(call=spoiled_calls())
def test_what_is_no_argument_is_refused_by_name(call):
    function, replaced = call
    replaced = {name: choices_for(CALLS[function][name])[number] for name, number in replaced.items()}
    note(replaced)
    arguments = CALLS[function] | replaced
    compiled, plain = (outcome(function, arguments, backend) for backend in (BACKEND, "reference"))
    assert isinstance(compiled, str) == isinstance(plain, str), (compiled, plain)
    if isinstance(compiled, str):
        assert any(name in compiled for name in CALLS[function]), f"{compiled!r} names no argument"
        return
    for found, expected in zip(compiled, plain):
        assert found.shape == expected.shape and found.dtype == expected.dtype and found.device == expected.device
        if not found.is_meta and not beyond_precision(arguments):
            bound = dict(rtol=2e-2, atol=2e-2) if found.dtype == torch.float16 else dict(rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found, expected, equal_nan=True, **bound)
