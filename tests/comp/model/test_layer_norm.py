"""LayerNorm: its gradients from 16-bit rows on a CPU beside float64, and nn.LayerNorm's own numbers where nothing learns."""

import pytest
import torch
from torch import nn

from comp.model.layer_norm import LayerNorm


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_whole_sums(dtype, parameters):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5000, 16, generator=generator).to(dtype) for _ in range(2))
    grad += 0.5
    norm, exact = LayerNorm(16).to(parameters), nn.LayerNorm(16).double()
    y = norm(x)
    assert y.dtype == dtype
    found = torch.autograd.grad(y, (norm.weight, norm.bias), grad)
    expected = torch.autograd.grad(exact(x.double()), (exact.weight, exact.bias), grad.double())
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-2 * other.abs().max().item())


def test_it_is_torch_s_own_where_nothing_learns():
    x = torch.randn(50, 16).bfloat16()
    norm, own = LayerNorm(16), nn.LayerNorm(16)
    with torch.no_grad():
        assert torch.equal(norm(x), own(x))
    assert torch.equal(norm.requires_grad_(False)(x), own(x))
    assert torch.equal(LayerNorm(16)(x.float()), own(x.float()))
