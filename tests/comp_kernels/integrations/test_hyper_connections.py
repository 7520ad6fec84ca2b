"""The projection of hyper-connections against Liger-Kernel's own kernels where it is installed, in Triton's interpreter, and
against the formulas of Megatron-LM's and Liger-Kernel's references in plain PyTorch."""

import copy
import importlib
import importlib.util
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from benchmarks.sinkhorn_peers import mhc_loop
from comp_kernels.integrations import liger_mhc_coeffs, patch_megatron, sinkhorn_knopp, unpatch_megatron


class HyperConnectionModule(nn.Module):
    """What patch_megatron looks at of Megatron-LM's class of this name."""

    def __init__(self):
        super().__init__()
        self._sinkhorn_op = mhc_loop

    def forward(self, logits):
        return self._sinkhorn_op(logits, 20, 1e-6)


def coefficients_of(function, inputs, **settings):
    """Results and gradients of a fixed weighted sum of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, **settings)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves)]


def make_inputs(streams, channels=16, tokens=(2, 5)):
    logits = streams * (streams + 2)
    scales = (torch.tensor(x) for x in (1.0, 0.7, 1.3))
    return torch.randn(*tokens, streams, channels), torch.randn(streams * channels, logits) * 0.3, torch.randn(logits), *scales


def coefficients_in_plain_torch(
    x, phi, b, alpha_pre, alpha_post, alpha_res, *, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult
):
    """mhc_coeffs_ref of Liger-Kernel's tests."""
    n = x.shape[-2]
    flat = x.flatten(-2)
    mix = (flat @ phi) * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + rms_eps)
    h_res = mhc_loop((mix[..., 2 * n :] * alpha_res + b[2 * n :]).unflatten(-1, (n, n)), tmax, sinkhorn_eps)
    return (
        torch.sigmoid(mix[..., :n] * alpha_pre + b[:n]) + pre_eps,
        torch.sigmoid(mix[..., n : 2 * n] * alpha_post + b[n : 2 * n]) * post_mult,
        h_res,
    )


@pytest.mark.parametrize("streams", (2, 4, 5))
def test_coefficients_equal_the_formulas(streams):
    inputs = make_inputs(streams)
    settings = dict(tmax=8, rms_eps=1e-6, pre_eps=1e-4, sinkhorn_eps=1e-6, post_mult=2.0)
    found = coefficients_of(liger_mhc_coeffs, inputs, **settings)
    expected = coefficients_of(coefficients_in_plain_torch, inputs, **settings)
    for x, y in zip(found[:3], expected[:3]):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    for x, y in zip(found[3:], expected[3:]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_coefficients_are_float32_under_autocast():
    inputs = make_inputs(4)
    expected = liger_mhc_coeffs(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = liger_mhc_coeffs(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))
    assert [x.shape for x in liger_mhc_coeffs(*(x.to("meta") for x in inputs))] == [x.shape for x in expected]


@pytest.fixture
def liger():
    """liger_kernel.ops.mhc; the rest of the package, which wants transformers and a GPU, is left out."""
    pytest.importorskip("triton", reason="triton is not installed")
    spec = importlib.util.find_spec("liger_kernel")
    if spec is None:
        pytest.skip("liger-kernel is not installed (pip install --no-deps liger-kernel)")
    before = set(sys.modules)
    package = types.ModuleType("liger_kernel.ops")
    package.__path__ = [f"{path}/ops" for path in spec.submodule_search_locations]
    sys.modules["liger_kernel.ops"] = package
    yield importlib.import_module("liger_kernel.ops.mhc")
    for name in set(sys.modules) - before:
        if name.startswith("liger_kernel"):
            del sys.modules[name]


@pytest.mark.parametrize("streams", (2, 4))
def test_equals_the_kernels_of_liger(liger, streams):
    """Its Triton kernels of the projection, forward and both ways backward, in the interpreter."""
    tokens, logits = 6, streams * (streams + 2)
    mix, bias = torch.randn(tokens, logits), torch.randn(logits)
    alphas = [torch.tensor(x) for x in (1.0, 0.7, 1.3)]
    settings = dict(tmax=5, sinkhorn_eps=1e-6)
    *_, theirs, history = liger.mhc_split_sinkhorn_fwd(
        mix, bias, *alphas, pre_eps=0.0, post_mult=2.0, return_hist=True, **settings
    )
    scores = (mix * alphas[2] + bias)[:, 2 * streams :].unflatten(-1, (streams, streams)).requires_grad_()
    ours = sinkhorn_knopp(scores, 5, 1e-6)
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-6)
    weights = torch.randn(ours.shape)
    (found,) = torch.autograd.grad((ours * weights).sum(), scores)
    for kept in (None, history):
        expected = liger.mhc_sinkhorn_bwd(mix, bias, alphas[2], weights, hist=kept, **settings)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_patched_model_of_megatron_projects_the_same(dtype):
    model = nn.Sequential(HyperConnectionModule(), nn.Identity())
    logits = torch.randn(3, 2, 4, 4).to(dtype)
    before = model[0](logits.float())
    assert patch_megatron(model) == ["0"] == patch_megatron(model)  # once more changes nothing
    for patched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        after = patched[0](logits)
        assert after.dtype == dtype
        torch.testing.assert_close(after.float(), before, rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
    assert unpatch_megatron(model) == ["0"] and model[0]._sinkhorn_op is mhc_loop and unpatch_megatron(model) == []


def test_what_cannot_be_patched_is_named():
    with pytest.raises(ValueError, match="Linear has no HyperConnectionModule"):
        patch_megatron(nn.Linear(2, 2))
    other = HyperConnectionModule()
    del other._sinkhorn_op
    with pytest.raises(ValueError, match="arranges HyperConnectionModule differently"):
        patch_megatron(other)
    assert unpatch_megatron(nn.Sequential(other)) == []
    x, phi, b, *alphas = make_inputs(4)
    with pytest.raises(ValueError, match=r"phi and b must be \(64, 24\) and \(24,\)"):
        liger_mhc_coeffs(x, phi[:, 1:], b, *alphas)
