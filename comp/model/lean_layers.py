"""Norms and MLPs of a transformers decoder that keep less for the backward pass, on a CPU in float32.

transformers writes both as chains of small operations, each of which keeps a tensor as large as its input. Here the backward
pass makes again what one pass over such a tensor can make: a norm keeps its input (transformers: two more of that size), a
gated MLP its two projections (transformers: two more of that size). GPUs, MLPs under autocast, and torch.compile, which fuses
such chains itself, have transformers' code.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RMSNorm(torch.autograd.Function):
    """x [..., D] / sqrt(mean(x^2) + eps) * weight [D]."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        width = len(weight)
        rstd = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / width + ctx.eps).rsqrt()
        # of a LayerNorm whose mean is 0, but for what it takes off because its mean depends on x
        wanted = [True, ctx.needs_input_grad[1], False]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, list(weight.shape), torch.zeros_like(rstd), rstd, weight, None, wanted
        )
        with torch.autocast("cpu", enabled=False):
            along = (grad @ weight).unsqueeze(-1)
        return grad_x.addcmul_(rstd, along, value=1 / width), grad_weight, None


class GatedProjection(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T, with gate and up [..., I] and weight [D, I]."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = grad.flatten(0, -2).T @ (activated * up).flatten(0, -2)
        grad_product = grad @ weight
        grad_up = activated.mul_(grad_product)
        return torch.ops.aten.silu_backward(grad_product.mul_(up), gate), grad_up, grad_weight


def _norm(module: Any, x: Tensor) -> Tensor:
    if not _serves(x, module.weight):
        return type(module).forward(module, x)
    return RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    serves = _serves(x, *(layer.weight for layer in layers)) and not torch.is_autocast_enabled("cpu")
    if not serves or not _plain(module.down_proj):
        return type(module).forward(module, x)
    return GatedProjection.apply(module.gate_proj(x), module.up_proj(x), module.down_proj.weight)


def _serves(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is its matrix and nothing else: no bias, no low-rank update beside it, no hook."""
    return type(layer) is nn.Linear and layer.bias is None and not (layer._forward_hooks or layer._forward_pre_hooks)


def make_lean(model: PreTrainedModel) -> None:
    """Give the norms and MLPs of a model that compute what is above these ways of doing so. Parameters and names stay."""
    for module in model.modules():
        if "forward" in vars(module):  # others have changed it
            continue
        for has_the_parts, forward in ((_is_norm, _norm), (_is_gated_mlp, _gated_mlp)):
            if has_the_parts(module) and _computes_the_same(module, forward):
                module.forward = MethodType(forward, module)


def _is_norm(module: Any) -> bool:
    return set(dict(module.named_parameters())) == {"weight"} and isinstance(getattr(module, "variance_epsilon", None), float)


def _is_gated_mlp(module: Any) -> bool:
    layers = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    return all(isinstance(layer, nn.Linear) for layer in layers) and _plain(module.down_proj)


def _computes_the_same(module: Any, forward: Any) -> bool:
    """Whether a module computes what `forward` does, tried on a few rows as in training: another activation, an offset of the
    weight, a clamp, dropout would show."""
    weight = next(module.parameters())
    takes = list(inspect.signature(type(module).forward).parameters)
    if len(takes) != 2 or not _serves(weight):  # the first one is self
        return False
    width = weight.shape[-1]
    x = torch.linspace(-3, 3, 4 * width).sin().view(2, 2, width)
    was_training = module.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected, found = module.train()(x), forward(module, x)
        return bool(torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()))
    except Exception:  # a module that takes or returns something else says so in any way
        return False
    finally:
        module.train(was_training)
