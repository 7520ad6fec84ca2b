"""What rope_attention and its tables refuse, in words; and tensors without values (meta, fake), which every operator takes."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import comp_kernels as ck
from comp_kernels.ops.rope_attention import plan

Q = torch.randn(4, 2, 16)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(q=None), r"q must be a tensor \[T, Hq, D\], got NoneType None"),
        (dict(q=np.ones((4, 2, 16))), r"q must be a tensor \[T, Hq, D\], got ndarray"),
        (dict(k=[1.0]), r"k must be a tensor \[Tk, Hkv, D\], got list"),
        (dict(q=Q.to_sparse()), "q must be dense, got layout torch.sparse_coo"),
        (dict(q=Q.to_sparse(), backend="reference"), "q must be dense, got layout torch.sparse_coo"),
        (dict(v=Q.to_sparse(), backend="reference"), "v must be dense, got layout torch.sparse_coo"),
        (dict(q=Q[..., :0], k=Q[..., :0], v=Q[..., :0]), r"a head size D of at least 1, got \(4, 2, 0\)"),
        (dict(rotary_dim=8.0), "rotary_dim must be an integer, got float 8.0"),
        (dict(pair_stride=4.0), "pair_stride must be an integer, got float 4.0"),
        (dict(scale=torch.tensor(0.1, requires_grad=True)), "scale must be a number, not a tensor"),
        (dict(scale="0.1"), "scale must be a number, not a tensor .* got str '0.1'"),
        (dict(scale=float("nan")), r"scale must be finite and at most 1.3e\+30 in size for arithmetic in float32, got nan"),
        (dict(scale=-float("inf")), "scale must be finite and at most .* got -inf"),
        (dict(scale=1e300), r"scale must be finite and at most .* got 1e\+300"),
        (dict(return_lse=Q), r"return_lse must be True or False, got \(4, 2, 16\)"),
        (dict(backend=np.ones(2)), r"backend must be one of .* got array\(\[1., 1.\]\)"),
    ],
)
def test_rope_attention_names_the_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ck.rope_attention(**{**dict(q=Q, k=Q, v=Q), **kwargs})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    """Those of layout torch.strided have no shape to ask for."""
    nested = torch.nested.nested_tensor([torch.ones(2, 16)])
    with pytest.raises(ValueError, match=r"k must be a tensor \[Tk, Hkv, D\], got a nested tensor of torch.float32"):
        ck.rope_attention(Q, nested, Q)
    with pytest.raises(ValueError, match=r"scores must be a tensor \[..., n, K\], got a nested tensor"):
        ck.sinkhorn(nested, epsilon=1.0)
    with pytest.raises(ValueError, match=r"epsilon must be a number, .* got a nested tensor"):
        ck.sinkhorn(Q, epsilon=nested)
    with pytest.raises(ValueError, match=r"vision must be a tensor \[n, D\], got a nested tensor"):
        ck.alignment_loss(nested, Q[0], Q[0])


def test_numbers_of_numpy_are_numbers():
    expected = ck.rope_attention(Q, Q, Q, scale=0.5, rotary_dim=8)
    assert torch.equal(ck.rope_attention(Q, Q, Q, scale=np.float32(0.5), rotary_dim=np.int64(8)), expected)


@pytest.mark.parametrize("backend", ck.available_backends("rope_attention", "cpu"))
@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-40, 1e-300, 1e30])
def test_any_finite_scale(scale, backend):
    """0 and what rounds to it share the weight out evenly, 1e30 gives it to one key, a negative one turns the order round."""
    leaves = [[torch.randn(7, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)] for _ in range(2)]
    leaves[0] = [x.double() for x in leaves[0]]
    found = []
    for tensors, name in zip(leaves, ("reference", backend)):
        tensors = [x.requires_grad_() for x in tensors]
        out, lse = ck.rope_attention(*tensors, scale=scale, backend=name, return_lse=True)
        *of_q_and_k, of_v = torch.autograd.grad(out.square().sum(), tensors)
        # Gradients of q and k are differences, whose rounding is multiplied by the scale.
        found.append([x.float() for x in (out, lse, of_v, *(of_q_and_k if abs(scale) <= 1 else []))])
    for actual, exact in zip(found[1], found[0]):
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_constants_of_inference_mode(dtype):
    """Bounds and marginals that an evaluation in inference mode left behind: autograd would not keep them for a gradient, nor
    may a plan that was made for others of their looks."""
    with torch.inference_mode():
        lent, ones = torch.tensor([0, 3, 4], dtype=dtype), torch.ones(4)
    own = torch.tensor([0, 3, 4], dtype=dtype)
    for bounds, bounds_k in ((own, None), (lent, None), (own, lent), (lent, own), (own, None)):
        q = Q.clone().requires_grad_()
        ck.rope_attention(q, Q, Q, cu_seqlens=bounds, cu_seqlens_k=bounds_k).square().sum().backward()
        expected = Q.clone().requires_grad_()
        ck.rope_attention(expected, Q, Q, cu_seqlens=own).square().sum().backward()
        assert torch.equal(q.grad, expected.grad)
    with torch.inference_mode():
        assert ck.rope_attention(Q, Q, Q, cu_seqlens=lent).is_inference()
    for gradient, eps in (("unrolled", 0.0), ("unrolled", 1e-6), ("implicit", 0.0)):
        scores = torch.randn(2, 4, 4, requires_grad=True)
        sides = dict(row_marginals=ones, col_marginals=ones)
        ck.sinkhorn(scores, epsilon=1.0, gradient=gradient, eps=eps, **sides).square().sum().backward()
        assert scores.grad.abs().sum() > 0


ZEROS = torch._efficientzerotensor
PLACES = ("q", "k", "v", "cos", "sin", "cos_k", "sin_k")


@pytest.mark.parametrize("place", PLACES)
def test_zeros_without_memory(place):
    """Forward-mode differentiation makes them; torch puts one number, expanded, in their place. A plan that was made for other
    zeros of their looks has no use for them."""
    tensors = dict(zip(PLACES, [Q, Q + 1, Q - 1, *(torch.randn(4, 16) for _ in range(4))]))
    tensors[place] = torch.zeros_like(tensors[place])
    expected = ck.rope_attention(**tensors)
    for _ in range(2):
        assert torch.equal(ck.rope_attention(**(tensors | {place: ZEROS(tensors[place].shape)})), expected)
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if name != place}
        ck.rope_attention(**leaves, **{place: ZEROS(tensors[place].shape)}).square().sum().backward()
        others = {name: x.clone().requires_grad_() for name, x in tensors.items() if name != place}
        ck.rope_attention(**others, **{place: tensors[place]}).square().sum().backward()
        for name, x in leaves.items():
            torch.testing.assert_close(x.grad, others[name].grad)


def test_zeros_without_memory_as_gradients_and_elsewhere():
    q = Q.clone().requires_grad_()
    out, lse = ck.rope_attention(q, Q, Q, return_lse=True)
    (found,) = torch.autograd.grad((out, lse), q, (ZEROS(out.shape), torch.ones_like(lse)), retain_graph=True)
    (expected,) = torch.autograd.grad(lse.sum(), q, retain_graph=True)
    torch.testing.assert_close(found, expected)
    (found,) = torch.autograd.grad((out, lse), q, (torch.ones_like(out), ZEROS(lse.shape)), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(out.sum(), q)[0])
    for shape in ((2, 4, 4), (2, 40, 50)):
        scores, plan = ZEROS(shape), torch.full(shape, 1 / shape[-1])
        torch.testing.assert_close(ck.sinkhorn(scores, epsilon=1.0), plan)
        masked = ck.sinkhorn(torch.randn(shape), epsilon=1.0, row_marginals=ZEROS(shape[1:2]), col_marginals=ZEROS(shape[2:]))
        assert (masked == 0).all()
    vision, text, prototypes = torch.randn(3, 8), torch.randn(3, 8), torch.randn(5, 8)
    for arguments in ((ZEROS((3, 8)), text, prototypes), (vision, ZEROS((3, 8)), prototypes), (vision, text, ZEROS((5, 8)))):
        real = [x + 0 for x in arguments]
        torch.testing.assert_close(ck.alignment_loss(*arguments), ck.alignment_loss(*real))


def test_distributed_tensors_are_refused():
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    init_process_group("fake", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        x = distribute_tensor(torch.randn(4, 2, 16), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"q must be a tensor of this process, got a DTensor .*: pass q.to_local\(\)"):
            ck.rope_attention(x, x, x)
        with pytest.raises(ValueError, match="scores must be a tensor of this process, got a DTensor"):
            ck.sinkhorn(x, epsilon=1.0)
        with pytest.raises(ValueError, match="prototypes must be a tensor of this process, got a DTensor"):
            ck.alignment_loss(Q[:, 0], Q[:, 0], x[:, 0])
    finally:
        destroy_process_group()


def test_bounds_of_a_vmapped_batch_are_refused():
    bounds = torch.tensor([[0, 4], [0, 3]])
    with pytest.raises(ValueError, match="cu_seqlens must be the same for all of a batch"):
        torch.vmap(lambda bounds: ck.rope_attention(Q, Q, Q, cu_seqlens=bounds))(bounds)


@pytest.mark.parametrize(
    "positions, freqs, message",
    [
        ([[0, 1]], torch.ones(2, 4), r"positions must be a tensor \[T, A\], got list"),
        (torch.ones(3, 2), [1.0], r"freqs must be a tensor \[A, R\] or \[H, A, R\], got list"),
        (torch.ones(3, 0), torch.ones(0, 4), r"with at least one axis, got \(3, 0\)"),
        (torch.ones(3, 2, dtype=torch.complex64), torch.ones(2, 4), "integers or floats, .* torch.complex64"),
        (torch.ones(3, 2, device="meta"), torch.ones(2, 4), "positions must be on cpu like freqs, got meta"),
        (torch.ones(3, 2), torch.ones(2, 4, dtype=torch.int64), "freqs must be float32"),
        (torch.ones(3, 2), torch.ones(2, 4).to_sparse(), "freqs must be dense"),
        (torch.ones(3, 2).to_mkldnn(), torch.ones(2, 4), "positions must be dense"),
    ],
)
def test_rope_tables_names_the_argument(positions, freqs, message):
    with pytest.raises(ValueError, match=message):
        ck.rope_tables(positions, freqs)


@pytest.mark.parametrize("layout", ("hw", np.ones(2)))
def test_axial_freqs_know_their_layouts(layout):
    with pytest.raises(ValueError, match=r"layout must be one of \('hwhw', .* got "):
        ck.axial_freqs(16, layout=layout)


@pytest.mark.parametrize("base", (0, -1.0, float("nan"), float("inf")))
def test_axial_freqs_need_a_base(base):
    with pytest.raises(ValueError, match="base must be positive and finite"):
        ck.axial_freqs(16, base)


def call_everything(device: str) -> None:
    """Every operator, forward and backward, with what is otherwise looked at: bounds, marginals, counts."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    q, bounds = leaf(4, 2, 16), torch.tensor([0, 1, 4], device=device)
    out, lse = ck.rope_attention(q, q, q, cu_seqlens=bounds, return_lse=True)
    (dq,) = torch.autograd.grad(out.sum() + lse.sum(), q)
    assert out.shape == dq.shape == (4, 2, 16) and lse.shape == (2, 4)

    scores, marginals = leaf(4, 6), dict(row_marginals=torch.ones(4, device=device), col_marginals=torch.ones(6, device=device))
    plan = ck.sinkhorn(scores, epsilon=0.5, gradient="unrolled", **marginals)
    assert torch.autograd.grad(plan.sum(), scores)[0].shape == plan.shape == (4, 6)

    vision = leaf(4, 8)
    loss = ck.alignment_loss(vision, leaf(4, 8), leaf(6, 8), prior=torch.ones(6, device=device))
    assert loss.shape == () and torch.autograd.grad(loss, vision)[0].shape == (4, 8)


def test_shapes_on_the_meta_device():
    call_everything("meta")


def test_shapes_of_fake_tensors():
    with FakeTensorMode():
        call_everything("cpu")


@pytest.mark.parametrize("backend", ck.available_backends("rope_attention", "cpu"))
@pytest.mark.parametrize("empty", ("queries", "keys", "heads", "everything", "all_in_slack"))
def test_empty_dimensions_of_rope_attention(empty, backend):
    """Gradients that no term reaches are zeros, not what memory held (tests/comp_kernels/conftest.py fills it with NaN)."""
    tokens, tokens_k, heads = {"queries": (0, 9, 2), "keys": (9, 0, 2), "heads": (9, 9, 0)}.get(empty, (9, 9, 2))
    bounds = bounds_k = torch.tensor([0, 0, 0], dtype=torch.int32)
    if empty not in ("everything", "all_in_slack"):
        bounds, bounds_k = (torch.tensor([0, n // 2, n], dtype=torch.int32) for n in (tokens, tokens_k))
    elif empty == "everything":
        tokens = tokens_k = 0
    for rotary in (False, True):
        q, k, v = (torch.randn(t, h, 16, requires_grad=True) for t, h in ((tokens, heads), (tokens_k, 1), (tokens_k, 1)))
        tables = (
            [torch.randn(t, 16, requires_grad=True) for t in (tokens, tokens, tokens_k, tokens_k)] if rotary else [None] * 4
        )
        out, lse = ck.rope_attention(
            q,
            k,
            v,
            *tables[:2],
            bounds,
            cos_k=tables[2],
            sin_k=tables[3],
            cu_seqlens_k=bounds_k,
            return_lse=True,
            backend=backend,
        )
        assert (out == 0).all() and (lse == -torch.inf).all()
        leaves = [q, k, v, *(tables if rotary else [])]
        for x, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
            assert gradient.shape == x.shape and (gradient == 0).all()


@pytest.mark.parametrize("backend", ck.available_backends("rope_attention", "cpu"))
def test_a_query_without_keys_has_zeros_whatever_it_is(backend):
    q, k = torch.full((3, 2, 16), torch.nan), torch.randn(1, 2, 16)
    bounds, bounds_k = torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1])
    out = ck.rope_attention(q, k, k, cu_seqlens=bounds, cu_seqlens_k=bounds_k, backend=backend)
    assert out[0].isnan().all() and (out[1:] == 0).all()


def test_more_tokens_than_bounds_can_tell():
    """An int64 bound was cut to the largest int32: rows behind it would have been zero, without a word."""
    q = torch.empty(2**31, 1, 16, device="meta")
    with pytest.raises(ValueError, match=r"q must have fewer than 2\*\*31 tokens"):
        ck.rope_attention(q, q, q)


def test_messages_about_many_sequences_are_short():
    q, bounds = torch.randn(4, 1, 16), torch.zeros(10_001, dtype=torch.int64)
    bounds[70:] = 3
    bounds[71] = 2
    with pytest.raises(ValueError, match=r"got \[3, 2\] at 70 of 10001 entries") as error:
        ck.rope_attention(q, q, q, cu_seqlens=bounds)
    assert len(str(error.value)) < 200
    rows, cols = torch.ones(10_000, 3), torch.ones(10_000, 3)
    cols[7] = 2
    with pytest.raises(ValueError, match=r"must have the same sum, got 3.0 and 6.0 in item \[7\]"):
        ck.sinkhorn(torch.randn(10_000, 3, 3), epsilon=1.0, row_marginals=rows, col_marginals=cols)


@pytest.mark.parametrize("backend", ck.available_backends("sinkhorn", "cpu"))
@pytest.mark.parametrize("shape", ((0, 4), (4, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0)))
def test_empty_dimensions_of_sinkhorn(shape, backend):
    plan, u, _ = ck.sinkhorn(torch.randn(shape), epsilon=0.5, backend=backend, return_potentials=True)
    assert plan.shape == shape and not any(x.isnan().any() for x in (plan, u))


@pytest.mark.parametrize("backend", ck.available_backends("alignment_loss", "cpu"))
@pytest.mark.parametrize("sizes", ((0, 8, 30), (0, 8, 0)))
def test_empty_dimensions_of_alignment_loss(sizes, backend):
    rows, dim, words = sizes
    vision = torch.randn(rows, dim, requires_grad=True)
    loss = ck.alignment_loss(vision, torch.randn(rows, dim), torch.randn(words, dim), backend=backend)
    assert loss == 0 and torch.autograd.grad(loss, vision)[0].shape == (rows, dim)


@pytest.mark.parametrize("last", (2**32 + 4, 2**31, -(2**32) + 4))
def test_compiled_code_refuses_bounds_that_wrap(last):
    bounds = torch.tensor([0, last])
    compiled = torch.compile(lambda bounds: ck.rope_attention(Q, Q, Q, cu_seqlens=bounds, backend="cpu"), backend="aot_eager")
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, never decrease and end at or below the 4 tokens"):
        compiled(bounds)


class TestCallsThatPassedBefore:
    """rope_attention does not check again what it knows by shapes, strides, dtypes and devices: all else it must still see."""

    def make(self):
        q, k, v = torch.randn(3, 6, 2, 8)
        cos, sin = torch.randn(2, 6, 8)
        arguments = dict(q=q, k=k, v=v, cos=cos, sin=sin, cu_seqlens=torch.tensor([0, 2, 6]), rotary_dim=8)
        ck.rope_attention(**arguments)
        arguments["cu_seqlens"] = arguments["cu_seqlens"].int()  # int64 is copied, and so not remembered
        for _ in range(2):
            ck.rope_attention(**arguments)
        return arguments

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(cu_seqlens=torch.tensor([0, 3, 2], dtype=torch.int32)), "never decrease"),
            (dict(cu_seqlens=torch.tensor([0, 2, 7], dtype=torch.int32)), "at or below the 6 tokens"),
            (dict(cu_seqlens=torch.tensor([1, 2, 6], dtype=torch.int32)), "start at 0"),
            (dict(cu_seqlens=torch.tensor([0.0, 2.0, 6.0])), "int32 or int64"),
            (dict(k=torch.randn(6, 2, 8).double()), "k must have dtype"),
            (dict(v=torch.randn(7, 2, 8)), "k and v must both be"),
            (dict(rotary_dim=8.0), "rotary_dim must be an integer"),
            (dict(sin=torch.randn(6, 4)), "same shape and dtype"),
            (dict(cos=torch.randn(6, 8).double()), "cos is float64"),
            (dict(q=[1.0]), r"q must be a tensor \[T, Hq, D\]"),
            (dict(scale=torch.tensor(1.0)), "scale must be a number"),
            (dict(q=torch.randn(6, 2, 8).to_sparse()), "q must be dense"),
        ],
    )
    def test_others_are_still_refused(self, change, message):
        arguments = self.make()
        with pytest.raises(ValueError, match=message):
            ck.rope_attention(**arguments | change)

    def test_copies_are_still_made(self):
        """Of what kernels do not take as it is: tables of another layout, channels that are not contiguous."""
        arguments = self.make()
        expected = ck.rope_attention(**arguments)
        for name, change in (
            ("cos", lambda x: x.T.contiguous().T),
            ("q", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ):
            for _ in range(2):
                torch.testing.assert_close(ck.rope_attention(**arguments | {name: change(arguments[name])}), expected)

    def test_autocast_still_casts(self):
        arguments = self.make()
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert ck.rope_attention(**arguments).dtype == dtype
        assert ck.rope_attention(**arguments).dtype == torch.float32

    def test_the_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr(plan, "MAX_PLANS", 5)
        for tokens in range(1, 30):
            x = torch.randn(tokens, 1, 8)
            ck.rope_attention(x, x, x)
            assert len(plan._plans) <= 5
