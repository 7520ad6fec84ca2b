"""alignment_loss as torch.library operators: schema, kernels, shapes for tracing, autograd, FLOP formula.

    comp_kernels::alignment_loss            -> (loss, gradient of vision); the second is empty when not wanted
    comp_kernels::alignment_loss_backward   -> gradient of vision, scaled

The forward pass has every tile of scores at hand, so it takes the gradient along, [n, D], and the prototypes are streamed
once less. `backend` names the module that runs; `group` is a process group's name.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._backends import function_of
from ..._namespace import LIBRARY, OPS, register
from .call import Call

OPERATOR = "alignment_loss"

LIBRARY.define(
    "alignment_loss(Tensor vision, Tensor text, Tensor prototypes, Tensor? prior, Tensor? valid, str mode, float epsilon, "
    "float temperature, int num_iters, float prior_temperature, bool normalize, str? group, bool gradient, str backend, "
    "bool fallback) "
    "-> (Tensor loss, Tensor grad_vision)"
)
# vision takes no part in it: as an argument it makes second derivatives reach this operator, which refuses them.
LIBRARY.define("alignment_loss_backward(Tensor grad_loss, Tensor grad_vision, Tensor vision) -> Tensor")


def forward(*arguments) -> tuple[Tensor, Tensor]:
    *inputs, backend, fallback = arguments
    return function_of(OPERATOR, "forward", backend, fallback)(Call(*inputs))


def forward_fake(*arguments) -> tuple[Tensor, Tensor]:
    call = Call(*arguments[:-2])
    return call.vision.new_empty(()), call.vision.new_empty(call.vision.shape if call.gradient else 0)


def backward(grad_loss: Tensor, grad_vision: Tensor, vision: Tensor) -> Tensor:
    return grad_loss * grad_vision


def backward_fake(grad_loss: Tensor, grad_vision: Tensor, vision: Tensor) -> Tensor:
    return grad_vision.new_empty(grad_vision.shape)


def setup_context(ctx, inputs, output) -> None:
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def autograd(ctx, grad_loss, _) -> tuple[Tensor | None, ...]:
    found = None if grad_loss is None else BACKWARD.default(grad_loss, *ctx.saved_tensors)
    return found, *(None for _ in range(ctx.num_inputs - 1))


def refuse_double_backward(ctx, *grads):
    raise NotImplementedError("alignment_loss has no second derivatives: use backend='reference' for double backward")


register("alignment_loss", forward, forward_fake, autograd, setup_context)
register("alignment_loss_backward", backward, backward_fake, refuse_double_backward)

FORWARD = OPS.alignment_loss
BACKWARD = OPS.alignment_loss_backward


@register_flop_formula(FORWARD)
def forward_flops(vision_shape, text_shape, prototypes_shape, *args, out_shape=None, **kwargs) -> int:
    """Two score products and, where a gradient is wanted, one more; products repeated for want of memory are not counted."""
    (rows, dim), words = vision_shape, prototypes_shape[0]
    products = 3 if args[-3] else 2
    return products * 2 * rows * words * dim
