"""What rope_attention and its tables refuse, in words; and tensors without values (meta, fake), which every operator takes."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import comp_kernels as ck

Q = torch.randn(4, 2, 16)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(q=None), r"q must be a tensor \[T, Hq, D\], got NoneType None"),
        (dict(q=np.ones((4, 2, 16))), r"q must be a tensor \[T, Hq, D\], got ndarray"),
        (dict(k=[1.0]), r"k must be a tensor \[Tk, Hkv, D\], got list"),
        (dict(q=Q.to_sparse()), "q must be dense, got layout torch.sparse_coo"),
        (dict(q=Q[..., :0], k=Q[..., :0], v=Q[..., :0]), r"a head size D of at least 1, got \(4, 2, 0\)"),
        (dict(rotary_dim=8.0), "rotary_dim must be an integer, got float 8.0"),
        (dict(pair_stride=4.0), "pair_stride must be an integer, got float 4.0"),
        (dict(scale=torch.tensor(0.1, requires_grad=True)), "scale must be a number, not a tensor"),
        (dict(scale="0.1"), "scale must be a number, not a tensor .* got str '0.1'"),
    ],
)
def test_rope_attention_names_the_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ck.rope_attention(**{**dict(q=Q, k=Q, v=Q), **kwargs})


def test_numbers_of_numpy_are_numbers():
    expected = ck.rope_attention(Q, Q, Q, scale=0.5, rotary_dim=8)
    assert torch.equal(ck.rope_attention(Q, Q, Q, scale=np.float32(0.5), rotary_dim=np.int64(8)), expected)


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
    ],
)
def test_rope_tables_names_the_argument(positions, freqs, message):
    with pytest.raises(ValueError, match=message):
        ck.rope_tables(positions, freqs)


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
