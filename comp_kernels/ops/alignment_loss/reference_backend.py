"""The definition as a backend of alignment_loss: for calls that no kernels serve."""

from __future__ import annotations

import torch
from torch import Tensor

from .._log_domain.over_group import group_by_name
from . import reference
from .call import Call


def unavailable_reason(device: torch.device) -> str | None:
    return None


def declines(call: Call) -> str | None:
    return None


def definition(call: Call) -> Tensor:
    """The loss of features as they are given, differentiable to any order."""
    with torch.autocast(call.device.type, enabled=False):  # the definition is float32 arithmetic
        return reference.alignment_loss(
            call.vision,
            call.text,
            call.prototypes,
            prior=call.prior,
            mode=call.mode,
            epsilon=call.epsilon,
            temperature=call.temperature,
            num_iters=call.num_iters,
            prior_temperature=call.prior_temperature,
            valid=call.valid,
            normalize=call.normalize,
            group=group_by_name(call.group),
        )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Loss and gradient (empty: not wanted) of features that were prepared."""
    prototypes = call.prototypes.to(call.vision.dtype)
    if call.normalize:
        prototypes = torch.nn.functional.normalize(reference.within_squares(prototypes), dim=-1)
    call = call._replace(prototypes=prototypes, normalize=False)
    if not call.gradient:
        return definition(call), call.vision.new_empty(0)
    # torch.func, since autograd proper is off where an operator's kernel runs.
    loss, gradient_of = torch.func.vjp(lambda vision: definition(call._replace(vision=vision)), call.vision)
    return loss, gradient_of(torch.ones_like(loss))[0]
