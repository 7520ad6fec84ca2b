"""sinkhorn as a torch.library operator: schema, kernels, shapes for tracing, autograd.

    comp_kernels::sinkhorn            -> (P, u, v), differentiable in the scores when `gradient` is "unrolled" or "implicit"
    comp_kernels::sinkhorn_backward   -> gradient of the scores

The first serves every backend: `backend` names the module that runs (see `_backends.IMPLEMENTATIONS`). `group` is a process
group's name, for an operator takes no Python objects.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..._backends import implementation
from ..._namespace import LIBRARY, OPS, register
from . import gradients, reference, small

OPERATOR = "sinkhorn"

LIBRARY.define(
    "sinkhorn(Tensor scores, Tensor row_marginals, Tensor col_marginals, float epsilon, int num_iters, float? tol, "
    "str? group, str gradient, str backend, str order='cols_rows', float eps=0.0) -> (Tensor plan, Tensor u, Tensor v)"
)
LIBRARY.define(
    "sinkhorn_backward(Tensor scores, Tensor row_marginals, Tensor col_marginals, Tensor plan, Tensor? grad_plan, "
    "Tensor? grad_u, Tensor? grad_v, float epsilon, int num_iters, str gradient, str backend='reference', "
    "str order='cols_rows', float eps=0.0) -> Tensor"
)


def group_by_name(name: str | None) -> dist.ProcessGroup | None:
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)


def forward(
    scores,
    row_marginals,
    col_marginals,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    group,
    gradient: str,
    backend: str,
    order: str = "cols_rows",
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    *batch, num_rows, num_cols = scores.shape
    settings = dict(epsilon=epsilon, num_iters=num_iters, tol=tol, group=group_by_name(group))
    # A process without rows still takes part in its group's exchanges, in the units of the other processes' backend.
    takes_part = group is not None and num_rows == 0
    if backend == "reference" or (scores.numel() == 0 and not takes_part):
        settings |= dict(row_marginals=row_marginals, col_marginals=col_marginals, order=order, eps=eps)
        return reference.sinkhorn(scores, return_potentials=True, **settings)
    kernels = implementation(OPERATOR, backend)
    items = math.prod(batch)
    flat = scores.reshape(items, num_rows, num_cols)
    rows, cols = (flat_marginal(x, items) for x in (row_marginals, col_marginals))
    if small.serves(num_rows, num_cols, tol, group):
        flat = items_contiguous(flat)
        plan, u, v = kernels.solve_small(flat, rows, cols, epsilon=epsilon, num_iters=num_iters, order=order, eps=eps)
    elif order == "rows_cols":
        plan, v, u = kernels.solve(flat.mT.contiguous(), cols, rows, **settings)
        plan = plan.mT.contiguous()
    else:
        plan, u, v = kernels.solve(flat if flat.stride(-1) == 1 else flat.contiguous(), rows, cols, **settings)
    return plan.view(scores.shape), u.view(*batch, num_rows), v.view(*batch, num_cols)


def flat_marginal(x: Tensor, items: int) -> Tensor:
    """[n] or [items, n], contiguous, as kernels take it; a reshape keeps the strides of zero of an expanded marginal."""
    return (x if x.dim() == 1 else x.reshape(items, x.shape[-1])).contiguous()


def items_contiguous(flat: Tensor) -> Tensor:
    """[G, n, K] with every matrix contiguous, and one matrix that stands for all where they are expanded."""
    return flat if flat[0].is_contiguous() else flat.contiguous()


def forward_fake(
    scores, row_marginals, col_marginals, epsilon, num_iters, tol, group, gradient, backend, order="cols_rows", eps=0.0
):
    *batch, num_rows, num_cols = scores.shape
    compute = row_marginals.dtype
    return (
        scores.new_empty(scores.shape, dtype=compute),
        scores.new_empty((*batch, num_rows), dtype=compute),
        scores.new_empty((*batch, num_cols), dtype=compute),
    )


def backward(
    scores,
    row_marginals,
    col_marginals,
    plan,
    grad_plan,
    grad_u,
    grad_v,
    epsilon: float,
    num_iters: int,
    gradient: str,
    backend: str = "reference",
    order: str = "cols_rows",
    eps: float = 0.0,
) -> Tensor:
    settings = dict(epsilon=epsilon, num_iters=num_iters, order=order, eps=eps)
    marginals, cotangents = (row_marginals, col_marginals), (grad_plan, grad_u, grad_v)
    *batch, num_rows, num_cols = scores.shape
    if gradient == "unrolled" and backend != "reference" and small.serves(num_rows, num_cols, None, None) and scores.numel():
        items = math.prod(batch)
        flat = items_contiguous(scores.reshape(items, num_rows, num_cols))
        cotangents = (None if x is None else x.contiguous() for x in cotangents)
        found = implementation(OPERATOR, backend).small_gradient(
            flat, *(flat_marginal(x, items) for x in marginals), *cotangents, **settings
        )
        return found.view(scores.shape)
    with torch.autocast(scores.device.type, enabled=False):  # its products stay in float32
        if gradient == "implicit":
            found = gradients.implicit(plan, *marginals, *cotangents, epsilon=epsilon)
        else:
            found = gradients.unrolled(scores, *marginals, *cotangents, **settings)
    return found.to(scores.dtype).contiguous()


def backward_fake(
    scores, row_marginals, col_marginals, plan, grad_plan, grad_u, grad_v, epsilon, num_iters, gradient,
    backend="reference", order="cols_rows", eps=0.0,
):  # fmt: skip
    return scores.new_empty(scores.shape)


def setup_context(ctx, inputs, output) -> None:
    scores, row_marginals, col_marginals, epsilon, num_iters, _, _, gradient, backend, order, eps = inputs
    ctx.settings = (epsilon, num_iters, gradient, backend, order, eps)
    ctx.save_for_backward(scores, row_marginals, col_marginals, output[0])
    ctx.set_materialize_grads(False)


def autograd(ctx, grad_plan, grad_u, grad_v) -> tuple[Tensor | None, ...]:
    found = BACKWARD.default(*ctx.saved_tensors, grad_plan, grad_u, grad_v, *ctx.settings)
    return found, *(None for _ in range(10))


def refuse_double_backward(ctx, *grads):
    raise NotImplementedError("sinkhorn has no second derivatives: use comp_kernels.reference.sinkhorn for double backward")


register("sinkhorn", forward, forward_fake, autograd, setup_context)
register("sinkhorn_backward", backward, backward_fake, refuse_double_backward)

FORWARD = OPS.sinkhorn
BACKWARD = OPS.sinkhorn_backward
