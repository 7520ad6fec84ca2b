"""alignment_loss as torch.library operators: schema, kernels, shapes for tracing, autograd, FLOP formula.

    comp_kernels::alignment_loss            -> (loss, gradient of vision, of prototypes); gradients are empty when not wanted
    comp_kernels::alignment_loss_backward   -> one of the gradients, scaled

The forward pass has every tile of scores at hand, so it takes the gradients along, and the prototypes are streamed once less.
`backend` names the module that runs; `group` is a process group's name.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._backends import function_of
from ..._namespace import LIBRARY, past_the_dispatcher, register, watched
from .call import Call

OPERATOR = "alignment_loss"

LIBRARY.define(
    "alignment_loss(Tensor vision, Tensor text, Tensor prototypes, Tensor? prior, Tensor? valid, str mode, float epsilon, "
    "float temperature, int num_iters, float prior_temperature, bool normalize, str? group, bool gradient, "
    "bool prototype_gradient, str backend, bool fallback) -> (Tensor loss, Tensor grad_vision, Tensor grad_prototypes)"
)
# x is what the gradient belongs to, and gives its dtype; as an argument it makes second derivatives reach this operator, which
# refuses them.
LIBRARY.define("alignment_loss_backward(Tensor grad_loss, Tensor gradient, Tensor x) -> Tensor")


def forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend, fallback = arguments
    call = Call(*inputs)
    with torch.autocast(call.device.type, enabled=False):  # its products stay in the dtypes that they are asked for
        return function_of(OPERATOR, "forward", backend, fallback)(call)


def forward_fake(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*arguments[:-2])
    new = functools.partial(call.vision.new_empty, dtype=torch.promote_types(call.vision.dtype, torch.float32))
    vision, prototypes = call.vision, call.prototypes
    return new(()), new(vision.shape if call.gradient else 0), new(prototypes.shape if call.prototype_gradient else 0)


def backward(grad_loss: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    return (grad_loss * gradient).to(x.dtype)


def backward_fake(grad_loss: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=x.dtype)


def setup_context(ctx, inputs, output) -> None:
    ctx.wanted = vision_wanted, prototypes_wanted = inputs[-4], inputs[-3]
    # What has no gradient is not held: it may be a copy for this call alone, of inference mode, or change before the backward.
    ctx.save_for_backward(
        output[1], inputs[0] if vision_wanted else None, output[2], inputs[2] if prototypes_wanted else None
    )  # fmt: skip
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def autograd(ctx, grad_loss, *_) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    # Of a gradient that is to be differentiated again (create_graph), the operator says that it cannot.
    through_operator = torch.is_grad_enabled() or saved[0].is_meta or watched((grad_loss, *saved))
    function = BACKWARD.default if through_operator else backward
    found = [
        function(grad_loss, gradient, x) if wanted and grad_loss is not None else None
        for wanted, gradient, x in zip(ctx.wanted, saved[::2], saved[1::2])
    ]
    return found[0], None, found[1], *[None] * (len(ctx.needs_input_grad) - 3)


def refuse_double_backward(ctx, *grads):
    raise NotImplementedError("alignment_loss has no second derivatives: use backend='reference' for double backward")


FORWARD = register("alignment_loss", forward, forward_fake, autograd, setup_context)
BACKWARD = register("alignment_loss_backward", backward, backward_fake, refuse_double_backward)
DIRECT = past_the_dispatcher(forward, setup_context, autograd)


def loss_of(call: Call, backend: str, fallback: bool) -> Tensor:
    """By the operator, or where nothing but autograd follows the call, by its kernel."""
    arguments = (*call, backend, fallback)
    if call.vision.is_meta or watched(call[:5]):
        return FORWARD.default(*arguments)[0]
    return DIRECT(*call[:3], arguments)[0]


@register_flop_formula(FORWARD)
def forward_flops(vision_shape, text_shape, prototypes_shape, *args, out_shape=None, **kwargs) -> int:
    """Two score products and one for each gradient that is wanted; products repeated for want of memory are not counted."""
    (rows, dim), words = vision_shape, prototypes_shape[0]
    products = 2 + bool(args[-4]) + bool(args[-3])
    return products * 2 * rows * words * dim
