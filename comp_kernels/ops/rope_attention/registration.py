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

from ..._backends import implementation
from ..._namespace import LIBRARY, OPS, register, watched

OPERATOR = "rope_attention"

TABLES = "Tensor? cos, Tensor? sin, Tensor? cos_k, Tensor? sin_k"
BOUNDS = "Tensor cu_seqlens, Tensor cu_seqlens_k"
SETTINGS = "int rotary_dim, int pair_stride, float scale, str backend"

LIBRARY.define(
    f"rope_attention_forward(Tensor q, Tensor k, Tensor v, {TABLES}, {BOUNDS}, {SETTINGS}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
# An absent gradient (no table, or not wanted) is an empty tensor: an operator cannot return None.
LIBRARY.define(
    "rope_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{TABLES}, {BOUNDS}, {SETTINGS}, bool table_grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def forward(
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim: int, pair_stride: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(OPERATOR, backend).forward(
        q,
        k,
        v,
        cos,
        sin,
        cos_k,
        sin_k,
        cu_seqlens,
        cu_seqlens_k,
        rotary_dim=rotary_dim,
        pair_stride=pair_stride,
        scale=scale,
    )


def forward_fake(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale, backend):
    dtype = torch.float64 if backend in ("cpu", "triton") else torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


def gradients(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    cos,
    sin,
    cos_k,
    sin_k,
    cu_seqlens,
    cu_seqlens_k,
    rotary_dim: int,
    pair_stride: int,
    scale: float,
    backend: str,
    table_grads: bool,
) -> tuple[Tensor | None, ...]:
    if q.numel() == 0:  # no query, no gradient; the kernels' loops over queries would leave their results unwritten
        tables = ((table if table_grads else None) for table in (cos, sin, cos_k, sin_k))
        zeros = (None if table is None else torch.zeros_like(table) for table in tables)
        return *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), *zeros
    return implementation(OPERATOR, backend).backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        cos,
        sin,
        cos_k,
        sin_k,
        cu_seqlens,
        cu_seqlens_k,
        rotary_dim=rotary_dim,
        pair_stride=pair_stride,
        scale=scale,
        table_grads=table_grads,
    )


def backward(grad_out, *arguments) -> tuple[Tensor, ...]:
    return tuple(grad_out.new_empty(0) if gradient is None else gradient for gradient in gradients(grad_out, *arguments))


def backward_fake(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    cos,
    sin,
    cos_k,
    sin_k,
    cu_seqlens,
    cu_seqlens_k,
    rotary_dim,
    pair_stride,
    scale,
    backend,
    table_grads,
):
    tables = (table if table_grads else None for table in (cos, sin, cos_k, sin_k))
    table_gradients = (q.new_empty(0) if table is None else table.new_empty(table.shape) for table in tables)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *table_gradients


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.rotary_dim, ctx.pair_stride, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # an unused lse has no gradient, and costs none


def autograd(ctx, grad_out, grad_lse) -> tuple[Tensor | None, ...]:
    q, k, v, *tables_and_bounds, out, lse = ctx.saved_tensors
    settings = (ctx.rotary_dim, ctx.pair_stride, ctx.scale, ctx.backend)
    table_grads = any(ctx.needs_input_grad[3:7])
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    # Of a gradient that is to be differentiated again (create_graph), the operator says that it cannot.
    direct = not (torch.is_grad_enabled() or q.is_meta or watched((grad_out, grad_lse, q, k, v, *tables_and_bounds)))
    function = gradients if direct else OPS.rope_attention_backward.default
    computed = function(grad_out, grad_lse, q, k, v, out, lse, *tables_and_bounds, *settings, table_grads)
    wanted = ctx.needs_input_grad[:7]
    return *(gradient if need else None for gradient, need in zip(computed, wanted)), None, None, *(None for _ in settings)


def refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        "rope_attention has no second derivatives in its fused backends: use backend='reference' for double backward "
        "(gradient penalties, Hessian products)"
    )


register("rope_attention_forward", forward, forward_fake, autograd, setup_context)
register("rope_attention_backward", backward, backward_fake, refuse_double_backward)

FORWARD = OPS.rope_attention_forward
BACKWARD = OPS.rope_attention_backward


def attention_flops(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> int:
    """2 D per score for q . k and 2 D for p . v; the rotation is not counted. An upper bound when the bounds are not real."""
    _, heads, head_dim = q.shape
    if isinstance(cu_seqlens, torch._subclasses.FakeTensor) or cu_seqlens.is_meta:
        return 4 * heads * head_dim * q.shape[0] * k.shape[0]
    scores = (cu_seqlens.diff().to(torch.int64) * cu_seqlens_k.diff().to(torch.int64)).sum().item()
    return 4 * heads * head_dim * scores


@register_flop_formula(FORWARD, get_raw=True)
def forward_flops(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, *args, out_val=None, **kwargs) -> int:
    return attention_flops(q, k, cu_seqlens, cu_seqlens_k)


@register_flop_formula(BACKWARD, get_raw=True)
def backward_flops(
    grad_out, grad_lse, q, k, v, out, lse, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, *args, out_val=None, **kwargs
) -> int:
    return attention_flops(q, k, cu_seqlens, cu_seqlens_k) * 5 // 2  # five products of that size instead of two


class DirectAttention(torch.autograd.Function):
    """The same kernel with the same autograd rule, past the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        setup_context(ctx, inputs, output)  # torch's own way of calling it inspects signatures, for 70 us
        return output

    backward = staticmethod(autograd)


def attention(
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim: int, pair_stride: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The differentiable operator; arguments checked and normalised by the public function."""
    tensors = (q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k)
    if q.is_meta or watched(tensors):
        function = FORWARD.default
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        function = DirectAttention.apply
    else:
        function = forward
    return function(*tensors, rotary_dim, pair_stride, scale, backend)
