"""Lean norms and MLPs: results and gradients of transformers, fewer tensors kept, and what computes something else stays."""

import copy

import pytest
import torch
from language_models import make_language_model
from torch import nn
from transformers import SeedOssConfig, SeedOssForCausalLM

from comp.model.lean_layers import GatedProjection, RMSNorm, make_lean

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral, window 16"]


def lean(family):
    """The same weights, not all ones in norms, lean and as transformers has them."""
    model = make_language_model(family)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    twin = copy.deepcopy(model)
    make_lean(model)
    return model, twin


def kinds(model):
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def loss_and_gradients(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family):
    model, twin = lean(family)
    name = family.split(",")[0]
    assert kinds(model) == {f"{name}RMSNorm", f"{name}MLP"}
    ids = torch.randint(3, 90, (2, 21))
    loss, gradients = loss_and_gradients(model, ids)
    expected, wanted = loss_and_gradients(twin.double(), ids)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, gradient in gradients.items():
        scale = 1e-4 * wanted[key].abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted[key], rtol=0, atol=scale, msg=lambda m, key=key: f"{key}: {m}")


def test_derivatives():
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, weight: RMSNorm.apply(x, weight, 0.1), (x, weight))
    gate, up = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    down = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GatedProjection.apply, (gate, up, down))
    assert RMSNorm.apply(torch.empty(1, 0, 5), torch.ones(5), 0.1).shape == (1, 0, 5)


def test_half_of_the_activations_are_kept():
    model, twin = lean("Llama")
    ids = torch.randint(3, 90, (1, 64))

    def kept(model):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: found.setdefault((x.untyped_storage().data_ptr(), x.data_ptr()), (x, x.numel())) and x, lambda x: x
        ):
            model(input_ids=ids, use_cache=False)
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        return sum(numel for (storage, _), (_, numel) in found.items() if storage not in weights)

    assert kept(model) < 0.7 * kept(twin)


@pytest.mark.parametrize("family", ["Gemma", "Bert as decoder, a layer in its head", "GPTNeoX"])
def test_what_computes_something_else_stays(family):
    """Gemma's norms add one to their weight, and its MLPs have another activation."""
    assert kinds(lean(family)[0]) == set()


def test_a_copy_has_its_own_weights():
    model, _ = lean("Llama")
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.model.norm.weight)
    hidden = torch.randn(1, 3, 32)
    assert twin.model.norm(hidden).eq(0).all() and not model.model.norm(hidden).eq(0).any()


def test_an_update_beside_a_matrix_is_not_passed_over():
    """LoRA comes after: the layer that multiplies is then another one."""
    model, twin = lean("Llama")

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for changed in (model, twin):
        changed.model.layers[0].mlp.down_proj.__class__ = Twice
    hidden = torch.randn(1, 3, 32)
    torch.testing.assert_close(model.model.layers[0].mlp(hidden), twin.model.layers[0].mlp(hidden))


def test_norms_stay_float32_under_autocast():
    """In the backward pass as well, wherever it is called."""
    models = lean("Llama")
    hidden, grad = torch.randn(1, 3, 32, requires_grad=True), torch.randn(1, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [model.model.norm(hidden) for model in models]
        gradients = [torch.autograd.grad(out, [hidden, model.model.norm.weight], grad) for out, model in zip(outs, models)]
    for a, b in zip([outs[0], *gradients[0]], [outs[1], *gradients[1]]):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert outs[0].grad_fn.name() == "RMSNormBackward"


def test_other_dtypes_and_mlps_under_autocast_have_transformers_code():
    model, twin = lean("Llama")
    hidden = torch.randn(1, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.model.layers[0].mlp(hidden), twin.model.layers[0].mlp(hidden))
    assert torch.equal(model.bfloat16().model.norm(hidden.bfloat16()), twin.bfloat16().model.norm(hidden.bfloat16()))


def test_dropout_stays():
    config = SeedOssConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    state = torch.get_rng_state()
    for dropout, families in ((0.1, {"SeedOssRMSNorm"}), (0.0, {"SeedOssRMSNorm", "SeedOssMLP"})):
        config.residual_dropout = dropout
        model = SeedOssForCausalLM(config).eval()
        torch.set_rng_state(state)
        make_lean(model)
        assert kinds(model) == families and not any(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state), "whether anything is tried changes no random number of a run"
