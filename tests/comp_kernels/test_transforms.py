"""torch.func transforms and forward-mode differentiation: served by the definition, since registered operators have no rules
for them, or refused by name."""

import pytest
import torch
from torch.autograd import forward_ad

import comp_kernels as ck
from comp_kernels.testing import AttentionCase, make_attention_inputs


def attention():
    inputs = make_attention_inputs(AttentionCase("packed", [3, 0, 5]), dtype=torch.float64)

    def call(q, backend=None):
        return ck.rope_attention(q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens, backend=backend)

    return call, inputs.q


def codes():
    def call(scores, backend=None):
        return ck.sinkhorn(scores, epsilon=0.1, gradient="unrolled", backend=backend)

    return call, torch.rand(4, 6, dtype=torch.float64)


def alignment():
    text, prototypes = torch.randn(4, 8, dtype=torch.float64), torch.randn(12, 8, dtype=torch.float64)

    def call(vision, backend=None):
        return ck.alignment_loss(vision, text, prototypes, epsilon=0.1, temperature=0.1, backend=backend)

    return call, torch.randn(4, 8, dtype=torch.float64)


OPERATORS = pytest.mark.parametrize("make", (attention, codes, alignment), ids=lambda make: make.__name__)


@OPERATORS
def test_jvp_is_the_slope_along_the_tangent(make):
    call, x = make()
    tangent, step = torch.randn_like(x), 1e-6
    slope = (call(x + step * tangent) - call(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(torch.func.jvp(call, (x,), (tangent,))[1], slope, atol=1e-7, rtol=1e-6)


@OPERATORS
def test_forward_mode_equals_jvp(make):
    call, x = make()
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, torch.func.jvp(call, (x,), (tangent,))[1])


@OPERATORS
def test_grad_equals_backward(make):
    call, x = make()
    leaf = x.clone().requires_grad_()
    call(leaf).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: call(x).square().sum())(x), leaf.grad, atol=1e-10, rtol=1e-10)


@OPERATORS
def test_vmap_equals_a_loop(make):
    call, x = make()
    batch = torch.stack([x, 2 * x, -x])
    torch.testing.assert_close(torch.func.vmap(call)(batch), torch.stack([call(one) for one in batch]))


@OPERATORS
def test_a_named_backend_refuses_transforms(make):
    call, x = make()
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run .* no rules for torch\.func"):
        torch.func.grad(lambda x: call(x, backend="cpu").sum())(x)


def test_implicit_gradients_refuse_transforms():
    with pytest.raises(ValueError, match="gradient='implicit' has no rules"):
        torch.func.jvp(lambda x: ck.sinkhorn(x, epsilon=0.1, gradient="implicit"), (torch.rand(4, 6),), (torch.rand(4, 6),))
