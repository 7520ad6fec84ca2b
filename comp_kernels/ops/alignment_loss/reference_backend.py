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
    arguments = {name: value for name, value in call._asdict().items() if name not in ("group", "gradient")}
    with torch.autocast(call.device.type, enabled=False):  # the definition is float32 arithmetic
        return reference.alignment_loss(**arguments, group=group_by_name(call.group))


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradients of vision and of prototypes (empty: not wanted), of the computing dtype."""
    wanted = [name for name, is_wanted in (("vision", call.gradient), ("prototypes", call.prototype_gradient)) if is_wanted]
    compute = torch.promote_types(call.vision.dtype, torch.float32)
    call = call._replace(**{name: getattr(call, name).to(compute) for name in wanted})
    absent = call.vision.new_empty(0, dtype=compute)
    if not wanted:
        return definition(call), absent, absent
    # torch.func, since autograd proper is off where an operator's kernel runs.
    loss, gradients_of = torch.func.vjp(
        lambda *tensors: definition(call._replace(**dict(zip(wanted, tensors)))), *(getattr(call, name) for name in wanted)
    )[:2]
    found = dict(zip(wanted, gradients_of(torch.ones_like(loss))))
    return loss, found.get("vision", absent), found.get("prototypes", absent)
