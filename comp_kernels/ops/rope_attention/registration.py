"""rope_attention as torch.library operators: schema, kernels, shapes for tracing, autograd, FLOP formula.

    comp_kernels::rope_attention_forward     -> (out, lse)
    comp_kernels::rope_attention_backward    -> (dq, dk, dv, dcos, dsin, dcos_k, dsin_k), an operator of its own

Both serve every backend: `backend` names the module that runs (see `_backends.IMPLEMENTATIONS`). torch.compile sees them as
opaque nodes whose shapes follow from their arguments' shapes, so a new number of tokens needs no new graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._backends import function_of, implementation
from ..._namespace import LIBRARY, register, watched
from .call import Call, call_of, shared_once

OPERATOR = "rope_attention"

TABLES = "Tensor? cos, Tensor? sin, Tensor? cos_k, Tensor? sin_k"
BOUNDS = "Tensor cu_seqlens, Tensor cu_seqlens_k"
SETTINGS = "int rotary_dim, int pair_stride, float scale"
CHOICE = "str backend, bool fallback"  # what choose_backend returns

LIBRARY.define(
    f"rope_attention_forward(Tensor q, Tensor k, Tensor v, {TABLES}, {BOUNDS}, {SETTINGS}, {CHOICE}) "
    "-> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
# An absent gradient (no table, or not wanted) is an empty tensor: an operator cannot return None.
LIBRARY.define(
    "rope_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{TABLES}, {BOUNDS}, {SETTINGS}, {CHOICE}, bool table_grads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def lse_dtype(call: Call, backend: str) -> torch.dtype:
    return implementation(OPERATOR, backend).LSE_DTYPE or torch.promote_types(call.q.dtype, torch.float32)


def forward(call: Call, backend: str, fallback: bool) -> tuple[Tensor, Tensor]:
    out, lse = function_of(OPERATOR, "forward", backend, fallback)(call)
    return out, lse.to(lse_dtype(call, backend)) if fallback else lse  # as promised, whichever backend ran


def forward_kernel(*arguments) -> tuple[Tensor, Tensor]:
    *inputs, backend, fallback = arguments
    return forward(laid_out(Call(*inputs)), backend, fallback)


def laid_out(call: Call) -> Call:
    """As `checked_call` made it. On the way through the dispatcher tensors may have become others with the same numbers: torch
    puts one zero, expanded, in the place of zeros without memory."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in call[:3])
    cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k = (x if x is None else x.contiguous() for x in call[3:9])
    return Call(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, *call[9:])


def forward_fake(*arguments) -> tuple[Tensor, Tensor]:
    *inputs, backend, _ = arguments
    call = Call(*inputs)
    return call.q.new_empty(call.q.shape), call.q.new_empty((call.q.shape[1], call.q.shape[0]), dtype=lse_dtype(call, backend))


def gradients(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    backend: str,
    fallback: bool,
    table_grads: bool,
) -> tuple[Tensor | None, ...]:
    """Of the first seven fields of the call; None for those of tables that are not there or not wanted."""
    if call.q.numel() == 0:  # no query, no gradient; the kernels' loops over queries would leave their results unwritten
        tables = (torch.zeros_like(table) if table is not None and table_grads else None for table in call[3:7])
        return *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in call[:3]), *tables
    function = function_of(OPERATOR, "backward", backend, fallback)
    return function(call, out, lse, grad_out, grad_lse, table_grads)


def backward_kernel(grad_out, grad_lse, q, k, v, out, lse, *arguments) -> tuple[Tensor, ...]:
    *inputs, backend, fallback, table_grads = arguments
    call, out, lse = laid_out(Call(q, k, v, *inputs)), out.contiguous(), lse.contiguous()
    found = gradients(call, out, lse, grad_out, grad_lse, backend, fallback, table_grads)
    return tuple(grad_out.new_empty(0) if gradient is None else gradient for gradient in found)


def backward_fake(grad_out, grad_lse, q, k, v, out, lse, cos, sin, cos_k, sin_k, *arguments) -> tuple[Tensor, ...]:
    tables = (table if arguments[-1] else None for table in (cos, sin, cos_k, sin_k))
    table_gradients = (q.new_empty(0) if table is None else table.new_empty(table.shape) for table in tables)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *table_gradients


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*shared_once(Call(*inputs[:12])), *output)
    ctx.settings = inputs[9:]
    ctx.set_materialize_grads(False)  # an unused lse has no gradient, and costs none


def autograd(ctx, grad_out, grad_lse=None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    found = gradients_of_saved(ctx.saved_tensors, ctx.settings, grad_out, grad_lse, True in wanted[3:7])
    return *[gradient if want else None for gradient, want in zip(found, wanted)], *[None] * (len(wanted) - 7)


def gradients_of_saved(
    saved: tuple, settings: tuple, grad_out: Tensor | None, grad_lse: Tensor | None, table_grads: bool
) -> tuple[Tensor | None, ...]:
    """`gradients` of what setup_context saved, by the operator for them where something else follows."""
    *inputs, out, lse = saved
    rotary_dim, pair_stride, scale, backend, fallback = settings
    call = call_of(inputs, (rotary_dim, pair_stride, scale))
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    # Of a gradient that is to be differentiated again (create_graph), the operator says that it cannot.
    if torch.is_grad_enabled() or call.q.is_meta or watched((grad_out, grad_lse, *saved)):
        return BACKWARD.default(
            grad_out, grad_lse, *call[:3], out, lse, *call[3:], backend, fallback, table_grads
        )  # fmt: skip
    return gradients(call, out, lse, grad_out, grad_lse, backend, fallback, table_grads)


def refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        "rope_attention has no second derivatives in its fused backends: use backend='reference' for double backward "
        "(gradient penalties, Hessian products)"
    )


FORWARD = register("rope_attention_forward", forward_kernel, forward_fake, autograd, setup_context)
BACKWARD = register("rope_attention_backward", backward_kernel, backward_fake, refuse_double_backward)


def attention_flops(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> int:
    """2 D per score for q . k and 2 D for p . v; the rotation is not counted. An upper bound when the bounds are not real."""
    _, heads, head_dim = q.shape
    if isinstance(cu_seqlens, torch._subclasses.FakeTensor) or cu_seqlens.is_meta:
        return 4 * heads * head_dim * q.shape[0] * k.shape[0]
    scores = (cu_seqlens.diff().to(torch.int64) * cu_seqlens_k.diff().to(torch.int64)).sum()
    return 4 * heads * head_dim * int(scores)


@register_flop_formula(FORWARD, get_raw=True)
def forward_flops(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, *args, out_val=None, **kwargs) -> int:
    return attention_flops(q, k, cu_seqlens, cu_seqlens_k)


@register_flop_formula(BACKWARD, get_raw=True)
def backward_flops(
    grad_out, grad_lse, q, k, v, out, lse, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, *args, out_val=None, **kwargs
) -> int:
    return attention_flops(q, k, cu_seqlens, cu_seqlens_k) * 5 // 2  # five products of that size instead of two
