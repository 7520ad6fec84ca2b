"""sinkhorn as a torch.library operator: schema, kernels, shapes for tracing, autograd.

    comp_kernels::sinkhorn            -> (P, u, v), differentiable in the scores when `gradient` is "unrolled" or "implicit"
    comp_kernels::sinkhorn_backward   -> gradient of the scores

The first serves every backend: `backend` names the module that runs (see `_backends.IMPLEMENTATIONS`). `group` is a process
group's name, for an operator takes no Python objects.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._backends import function_of, transforms_active
from ..._namespace import LIBRARY, past_the_dispatcher, register, watched
from . import gradients, reference_backend, small
from .call import Call

OPERATOR = "sinkhorn"

LIBRARY.define(
    "sinkhorn(Tensor scores, Tensor? row_marginals, Tensor? col_marginals, float epsilon, int num_iters, float? tol, "
    "str? group, str order, float eps, str gradient, str backend, bool fallback) -> (Tensor plan, Tensor u, Tensor v)"
)
LIBRARY.define(
    "sinkhorn_backward(Tensor scores, Tensor? row_marginals, Tensor? col_marginals, Tensor plan, Tensor? grad_plan, "
    "Tensor? grad_u, Tensor? grad_v, float epsilon, int num_iters, str order, float eps, str gradient, str backend, "
    "bool fallback) -> Tensor"
)


def forward(call: Call, backend: str, fallback: bool) -> tuple[Tensor, Tensor, Tensor]:
    *batch, num_rows, num_cols = call.scores.shape
    # A process without rows still takes part in its group's exchanges, in the units of the other processes' backend.
    takes_part = call.group is not None and num_rows == 0
    if backend == "reference" or (call.scores.numel() == 0 and not takes_part):
        return reference_backend.forward(call)
    if call.order == "rows_cols" and not small.serves(call):
        plan, v, u = forward(transposed(call), backend, fallback)
        return plan.mT.contiguous(), u, v
    flat = flattened(call)
    plan, u, v = function_of(OPERATOR, "forward", backend, fallback)(flat)
    if flat.scores.dim() == call.scores.dim():
        return plan, u, v
    return plan.view(call.scores.shape), u.view(*batch, num_rows), v.view(*batch, num_cols)


def flattened(call: Call) -> Call:
    """The call as kernels take it: one dimension of batch items, or none. A reshape keeps the strides of zero of a marginal."""
    *batch, num_rows, num_cols = call.scores.shape
    scores, rows, cols = call[:3]
    if len(batch) > 1 or (call.group is not None and not batch):
        items = math.prod(batch)
        scores = scores.reshape(items, num_rows, num_cols)
        rows, cols = (x if x is None or x.dim() == 1 else x.reshape(items, x.shape[-1]) for x in (rows, cols))
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    if scores is call.scores and rows is cols is None:
        return call
    rows, cols = (x if x is None else x.contiguous() for x in (rows, cols))
    return Call(scores, rows, cols, *call[3:])


def transposed(call: Call) -> Call:
    """The same problem with rows and columns in each other's place."""
    rows, cols = call.marginals()
    return call._replace(scores=call.scores.mT, row_marginals=cols, col_marginals=rows, order="cols_rows")


def forward_kernel(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, _, backend, fallback = arguments
    return forward(Call(*inputs), backend, fallback)


def forward_fake(scores, row_marginals, col_marginals, epsilon, num_iters, tol, group, *settings):
    *batch, num_rows, num_cols = scores.shape
    compute = torch.promote_types(scores.dtype, torch.float32)
    return (
        scores.new_empty(scores.shape, dtype=compute),
        scores.new_empty((*batch, num_rows), dtype=compute),
        scores.new_empty((*batch, num_cols), dtype=compute),
    )


def backward(scores, row_marginals, col_marginals, plan, grad_plan, grad_u, grad_v, *settings) -> Tensor:
    epsilon, num_iters, order, eps, gradient, backend, fallback = settings
    call = Call(scores, row_marginals, col_marginals, epsilon, num_iters, None, None, order, eps)
    cotangents = (grad_plan, grad_u, grad_v)
    if gradient == "unrolled" and backend != "reference" and small.serves(call) and scores.numel():
        flat = flattened(call)
        *items, num_rows, num_cols = flat.scores.shape
        shapes = (*items, num_rows, num_cols), (*items, num_rows), (*items, num_cols)
        reshaped = (None if x is None else x.reshape(shape).contiguous() for x, shape in zip(cotangents, shapes))
        return function_of(OPERATOR, "small_gradient", backend, fallback)(flat, *reshaped).view(scores.shape)
    marginals = call.marginals()
    with torch.autocast(scores.device.type, enabled=False):  # its products stay in float32
        if gradient == "implicit":
            found = gradients.implicit(plan, *marginals, *cotangents, epsilon=epsilon)
        else:
            iterations = dict(epsilon=epsilon, num_iters=num_iters, order=order, eps=eps)
            found = gradients.unrolled(scores, *marginals, *cotangents, **iterations)
    return found.to(scores.dtype).contiguous()


def backward_fake(scores, *_) -> Tensor:
    return scores.new_empty(scores.shape)


def setup_context(ctx, inputs, output) -> None:
    scores, row_marginals, col_marginals, epsilon, num_iters, _, _, order, eps, gradient, backend, fallback = inputs
    ctx.settings = (epsilon, num_iters, order, eps, gradient, backend, fallback)
    ctx.save_for_backward(scores, row_marginals, col_marginals, output[0])
    ctx.set_materialize_grads(False)


def autograd(ctx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = (*ctx.saved_tensors, *cotangents)
    # Of a gradient that is to be differentiated again (create_graph), the operator says that it cannot.
    through_operator = torch.is_grad_enabled() or tensors[0].is_meta or watched(tensors)
    found = (BACKWARD.default if through_operator else backward)(*tensors, *ctx.settings)
    return found, *[None] * (len(ctx.needs_input_grad) - 1)


def refuse_double_backward(ctx, *grads):
    raise NotImplementedError("sinkhorn has no second derivatives: use comp_kernels.reference.sinkhorn for double backward")


FORWARD = register("sinkhorn", forward_kernel, forward_fake, autograd, setup_context)
BACKWARD = register("sinkhorn_backward", backward, backward_fake, refuse_double_backward)
DIRECT = past_the_dispatcher(forward_kernel, setup_context, autograd)


def solve(call: Call, gradient: str, backend: str, fallback: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, or where nothing but autograd follows the call, its kernel."""
    if not transforms_active():
        if call.scores.is_meta or watched(call[:3]):
            return FORWARD.default(*call, gradient, backend, fallback)
        if gradient != "detach" and call.scores.requires_grad and torch.is_grad_enabled():
            return DIRECT(call.scores, (*call, gradient, backend, fallback))
    return forward(call, backend, fallback)
