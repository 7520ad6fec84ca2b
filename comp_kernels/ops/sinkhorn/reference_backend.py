"""The definition as a backend of sinkhorn: for calls that no kernels serve, and for those with nothing to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from .._log_domain.over_group import group_by_name
from . import gradients, reference
from .call import Call


def unavailable_reason(device: torch.device) -> str | None:
    return None


def declines(call: Call) -> str | None:
    return None


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """P [..., n, K], u [..., n], v [..., K]."""
    arguments = call._asdict() | dict(group=group_by_name(call.group))
    plan, u, v = reference.sinkhorn(**arguments, return_potentials=True)
    return plan, u, v


def small_gradient(call: Call, grad_plan: Tensor | None, grad_u: Tensor | None, grad_v: Tensor | None) -> Tensor:
    """Of the scores of small matrices, where the kernels that made the plan have failed since."""
    found = gradients.unrolled(
        call.scores,
        *call.marginals(),
        grad_plan,
        grad_u,
        grad_v,
        epsilon=call.epsilon,
        num_iters=call.num_iters,
        order=call.order,
        eps=call.eps,
    )
    return found.to(call.scores.dtype)
