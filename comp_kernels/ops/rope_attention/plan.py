"""How calls of rope_attention are carried out past torch's dispatcher, worked out once for all that look alike.

A tower makes the same call in every layer, and many times: checks, the choice of the backend, autograd's needs and the struct
that kernels get all follow from shapes, strides, dtypes, devices and settings.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..._backends import ENVIRONMENT_VARIABLE, failure, implementation, kernels_failed, transforms_active
from ..._checks import of_inference_mode
from ..._namespace import are_plain, followed, watched
from .call import Call, Tensors, call_of, check_bounds_on_cpu, shared_once, with_bounds
from .native import Misaligned
from .registration import FORWARD, OPERATOR, forward, gradients, gradients_of_saved


class Plan:
    """How one call is carried out, and all that look like it."""

    def __init__(self, call: Call, backend: str, fallback: bool) -> None:
        self.settings, self.backend, self.fallback = (call.rotary_dim, call.pair_stride, call.scale), backend, fallback
        self.module = implementation(OPERATOR, backend)
        self.strides, self.dtype, self.device, self.device_type = call.strides, call.q.dtype, call.device, call.device.type
        wants = [x is not None and x.requires_grad for x in call[:7]]
        self.num_inputs = 0 if True not in wants else 7 if True in wants[3:] else 3  # of the autograd function
        self.passes: Any = None  # the backend's, where it has them ready

    def prepare(self, call: Call) -> None:
        """For calls to come."""
        if hasattr(self.module, "passes") and call.q.numel() and failure(OPERATOR, self.backend, self.device) is None:
            self.passes = self.module.passes(with_bounds(call))

    def holds(self) -> bool:
        """Whether it may be used now: nothing else follows the call or changes what it computes."""
        return not (
            followed()
            or transforms_active()
            or (torch.is_autocast_enabled(self.device_type) and torch.get_autocast_dtype(self.device_type) != self.dtype)
            or self.module.unavailable_reason(self.device) is not None
        )

    def run(self, tensors: Tensors, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        """tensors: of such a call, None for those of keys that are the queries'. Without with_lse, lse may be None."""
        if tensors[7] is None:
            tensors = shared_once(with_bounds(call_of(tensors, self.settings)))
        if not (self.num_inputs and torch.is_grad_enabled()):
            return self.forward(tensors)
        inputs = tensors if self.num_inputs == 3 else call_of(tensors, self.settings)
        output = apply_direct(*inputs[: self.num_inputs], (self, tensors, with_lse))
        return output if with_lse else (output, None)

    def forward(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        if self.passes is not None:
            try:
                return self.passes.forward(*tensors)
            except Misaligned:
                pass  # the backend makes copies
            except Exception as error:
                self._failed(error)
        return forward(call_of(tensors, self.settings), self.backend, self.fallback)

    def backward(
        self, saved: tuple, grad_out: Tensor | None, grad_lse: Tensor | None, table_grads: bool
    ) -> tuple[Tensor | None, ...]:
        """saved: the tensors of a call, out and lse. The gradients of the first seven; None for those of tables that are not
        there or not wanted."""
        q, k, v = saved[:3]
        if (
            grad_out is None
            or torch.is_grad_enabled()
            or (q.stride(), k.stride(), v.stride()) != self.strides  # hooks of saved tensors gave copies
            or watched((grad_out, grad_lse))
        ):
            settings = (*self.settings, self.backend, self.fallback)
            return gradients_of_saved(saved, settings, grad_out, grad_lse, table_grads)
        if self.passes is not None:
            try:
                return self.passes.backward(*saved, grad_out, grad_lse, table_grads)
            except Misaligned:
                pass
            except Exception as error:
                self._failed(error)
        *tensors, out, lse = saved
        return gradients(
            call_of(tensors, self.settings), out, lse, grad_out, grad_lse, self.backend, self.fallback, table_grads
        )

    def _failed(self, error: Exception) -> None:
        """Of kernels that the user did not name: another backend takes their place, on the way of a first call."""
        if not (self.fallback and kernels_failed(error)):
            raise error
        self.passes = None


class DirectAttention(torch.autograd.Function):
    """The operator's kernel with its autograd rule. torch takes half a microsecond for each argument and result: tables are
    arguments only where they want a gradient, and lse is a result only where it is wanted."""

    @staticmethod
    def forward(ctx, *arguments):
        plan, tensors, with_lse = arguments[-1]
        out, lse = plan.forward(tensors)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.plan = plan
        if not with_lse:
            return out
        ctx.set_materialize_grads(False)  # an unused lse has no gradient, and costs none
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse=None):
        plan = ctx.plan
        found = plan.backward(ctx.saved_tensors, grad_out, grad_lse, plan.num_inputs == 7)
        return *found[: plan.num_inputs], None


# Without torch's wrapper in Python, which looks for tensors left over from a torch.func transform: those are `watched`.
apply_direct = super(torch.autograd.Function, DirectAttention).apply


def attention(plan: Plan, call: Call, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The differentiable operator on a call that was checked, by the plan for it; without with_lse, lse may be None."""
    tensors = shared_once(call)
    if not (call.q.is_meta or watched(tensors)):
        return plan.run(tensors, with_lse)
    return FORWARD.default(*with_bounds(call), plan.backend, plan.fallback)


# --- plans that are kept ---------------------------------------------------------------------------------------------------

MAX_PLANS = 1024  # every new number of tokens is one more
_plans: dict[tuple, Plan] = {}


def recall(
    tensors: Tensors, rotary_dim: int | None, pair_stride: int | None, scale: float | None, backend: str | None
) -> tuple[tuple | None, Plan | None]:
    """What the call looks like: all that a plan follows from; and the plan of an earlier one, if it holds now.

    (None, None) of what is no tensor (the checks have words for it), of symbolic shapes, and while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return None, None
    try:
        found = (
            *map(look, tensors),
            *(rotary_dim, type(rotary_dim), pair_stride, type(pair_stride), scale, type(scale)),
            os.environ.get(ENVIRONMENT_VARIABLE) if backend is None else backend,
        )
        plan = _plans.get(found)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None, None
    if plan is None or not plan.holds() or of_inference_mode(tensors[7]) or of_inference_mode(tensors[8]):
        return found, None
    if plan.device_type == "cpu":
        check_bounds_on_cpu("cu_seqlens", tensors[7], tensors[0].shape[0])
        check_bounds_on_cpu("cu_seqlens_k", tensors[8], tensors[1].shape[0])
    return found, plan


def look(x: Tensor | None) -> tuple | None:
    """What is asked of one tensor, but for the values of bounds: by the checks, the kernels, autograd, and `are_plain`."""
    if x is None:
        return None
    unusual = x.is_neg() or x._is_zerotensor() or not torch._C._has_storage(x)
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, unusual


def keep(found: tuple | None, plan: Plan, tensors: Tensors, call: Call) -> None:
    """The plan by which the call went, for those that look like it; where the checks changed tensors there is none."""
    if found is None or call.q.is_meta or not are_plain(tensors):
        return
    if any(x is not None and x is not used for x, used in zip(tensors, call)):
        return
    plan.prepare(call)
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    _plans[found] = plan
