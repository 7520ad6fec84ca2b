"""The definition as a backend of rope_attention: for calls that no kernels serve."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .call import Call

LSE_DTYPE = None  # the computing dtype


def unavailable_reason(device: torch.device) -> str | None:
    return None


def declines(call: Call) -> str | None:
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable to any order."""
    with torch.autocast(call.device.type, enabled=False):  # the definition is float32 arithmetic
        out, lse = reference.rope_attention(**call._asdict(), return_lse=True)
    return out, lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, table_grads: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of forward's arguments, as `Backend`s of kernels return them; recomputed, out and lse are not needed."""
    wanted = [x is not None and (table_grads or i < 3) for i, x in enumerate(call[:7])]

    def results(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(inputs)
        return forward(Call._make([*(next(given) if want else x for x, want in zip(call, wanted)), *call[7:]]))

    # torch.func, since autograd proper is off where an operator's kernel runs.
    (_, found_lse), gradients = torch.func.vjp(results, *(x for x, want in zip(call, wanted) if want))[:2]
    grad_lse = torch.zeros_like(found_lse) if grad_lse is None else grad_lse.to(found_lse.dtype)
    found = iter(gradients((grad_out, grad_lse)))
    return tuple(next(found) if want else None for want in wanted)
