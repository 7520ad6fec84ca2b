"""Outputs and parameter gradients of a patched model against the unpatched one, within the error budget of the dtype."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from comp_kernels.testing import check_draws


@dataclass
class Tower:
    """A small random model and one batch for it; `pick` takes from its output what a user of the model would use."""

    model: nn.Module
    inputs: dict
    pick: Callable = lambda output: output.last_hidden_state
    patched_modules: int = 2


def with_parameters_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with parameters and biases in `dtype`; other buffers (frequencies, complex tables) stay as the model made them."""
    model = copy.deepcopy(model)
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(p, nn.Parameter) or name.endswith("bias"):
            p.data = p.data.to(dtype)
    return model


def widen(x, dtype: torch.dtype):
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def outputs_and_gradients(tower: Tower, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The picked output and the gradient of every parameter, for a fixed random cotangent."""
    output = tower.pick(model(**{name: widen(x, dtype) for name, x in tower.inputs.items()}))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    output.backward(cotangent)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that attention is far from uniform and every parameter matters, drawn alike for all models."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        with torch.no_grad():
            if p.dim() > 1:
                p.copy_(noise * (2.0 if "q_" in name or "k_" in name or "qkv" in name else 1.0) * p.shape[1:].numel() ** -0.5)
            elif "q_norm" in name or "k_norm" in name:  # logits of a few units
                p.copy_((1 + 0.1 * noise) * p.numel() ** -0.25)
            elif name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise)
    return model


def lift_float32(patches: pytest.MonkeyPatch) -> None:
    """Models rotate and sum in float32 whatever their dtype: not in the truth."""
    new_zeros = Tensor.new_zeros

    def wide_zeros(x: Tensor, *size, dtype: torch.dtype | None = None, **options) -> Tensor:
        return new_zeros(x, *size, dtype=torch.float64 if dtype == torch.float32 else dtype, **options)

    patches.setattr(Tensor, "float", Tensor.double)
    patches.setattr(Tensor, "new_zeros", wide_zeros)


def check_parity(tower: Tower, patch: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, draws: int = 8) -> None:
    """Patched against unpatched in `dtype`; both measured against the unpatched model in float64.

    The largest rounding error of one draw of the weights is luck on both sides, and of the processor, whose sums run in another
    order; so where one does not settle it, the largest over `draws` of them counts.
    """
    check_draws(lambda seed: three_ways(tower, patch, dtype, monkeypatch, seed), range(draws))


def three_ways(
    tower: Tower, patch: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Output and gradients of the patched model, of the unpatched one in float64, and of that in `dtype`."""
    randomize(tower.model, seed)
    model = with_parameters_in(tower.model, dtype).eval()
    rounded = with_parameters_in(model, torch.float64)  # the same numbers, so that only arithmetic differs
    peer = outputs_and_gradients(tower, copy.deepcopy(model), dtype)
    assert len(patch(model)) == tower.patched_modules
    actual = outputs_and_gradients(tower, model, dtype)
    with monkeypatch.context() as lifted:
        lift_float32(lifted)
        inputs = {name: widen(widen(x, dtype), torch.float64) for name, x in tower.inputs.items()}
        exact = outputs_and_gradients(Tower(tower.model, inputs, tower.pick), rounded, torch.float64)
    assert actual.keys() == peer.keys() == exact.keys()
    outputs = tuple(x.pop("output") for x in (actual, exact, peer))
    # All gradients at once, each in units of its largest value, since one tensor alone may happen to have an exact peer. Some
    # are zero in exact arithmetic (a bias of keys): these in units of the largest of all.
    sizes = {name: float(gradient.abs().max()) for name, gradient in exact.items()}
    largest = max(sizes.values())
    units = {name: size if size > 1e-6 * largest else largest for name, size in sizes.items()}

    def joined(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradients[name].double().flatten() / unit for name, unit in units.items()])

    return {"output": outputs, "gradients": (joined(actual), joined(exact), joined(peer).to(dtype))}
