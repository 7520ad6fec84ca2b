"""The public rope_attention."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ..._backends import choose_backend
from ..._checks import check_bool, has_values
from . import reference_backend
from .call import checked_call, table_dtype
from .plan import Plan, attention, keep, recall


# fmt: off
@overload
def rope_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, cu_seqlens: Tensor | None = None, *,
    max_seqlen: int | None = None, rotary_dim: int | None = None, pair_stride: int | None = None,
    cos_k: Tensor | None = None, sin_k: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None, scale: float | None = None, return_lse: Literal[False] = False,
    deterministic: bool = True, backend: str | None = None,
) -> Tensor: ...
@overload
def rope_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, cu_seqlens: Tensor | None = None, *,
    max_seqlen: int | None = None, rotary_dim: int | None = None, pair_stride: int | None = None,
    cos_k: Tensor | None = None, sin_k: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None, scale: float | None = None, return_lse: Literal[True],
    deterministic: bool = True, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    rotary_dim: int | None = None,
    pair_stride: int | None = None,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bidirectional attention within each packed sequence, with rotary embedding of q and k on the fly.

        for sequence (queries i, keys j) and head h:
            S_ij = scale * rot(q_i) . rot(k_j)      out_i = sum_j softmax_j(S_ij) v_j      lse_i = log sum_j exp S_ij
            rot(x) = x * cos + swap(x) * sin over the first rotary_dim channels, swap: (a, b) -> (-b, a) for channels
                     that are pair_stride apart (RoFormer, arXiv 2104.09864, with per-token angles of any axes)

    Args:
        q:  [T, Hq, D], the query tokens of all sequences, packed. float32, float64, bfloat16 or float16.
        k:  [Tk, Hkv, D]. Hq must be a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
        v:  [Tk, Hkv, D]. q, k, v may be views with any token and head stride (slices of one qkv tensor, say).
        cos:  [T, R] or, per head, [T, Hq, R] with R = rotary_dim; or half as wide, one value per pair.
            None: no rotation. float32 is best; narrower dtypes are widened. Rows of (1, 0) leave a token as it is
            (CLS, registers). The table need not be a rotation: gradients use the true transpose.
        sin:  as cos, and given where cos is.
        cu_seqlens:  [B + 1] int32 or int64, sequence b owns rows cu_seqlens[b]:cu_seqlens[b + 1]. Empty sequences are
            fine. Rows from cu_seqlens[-1] on are never read; their out and gradients are zero. None: one sequence of all rows.
        max_seqlen:  a hint, accepted for drop-in use and never needed.
        rotary_dim:  channels that turn, default D.
        pair_stride:  channels between the two of a pair: default rotary_dim / 2 ("rotate half"); 1 is "interleaved".
        cos_k:  table of the keys, [Tk, R] or [Tk, Hkv, R], or half as wide. Default: that of the queries.
        sin_k:  as cos_k.
        cu_seqlens_k:  [B + 1], key sequences for cross attention. Default: those of the queries.
        max_seqlen_k:  as max_seqlen.
        scale:  softmax scale, default D ** -0.5. A number; for one that is learned multiply q by it.
        return_lse:  also return lse [Hq, T], float32 (float64 for float64 inputs); -inf for rows without keys.
        deterministic:  the gradients are bit-equal from run to run; every backend does this at no extra cost today.
        backend:  "reference", "cpu", "triton", "cuda" or None (by device; see comp_kernels.available_backends).

    Returns:
        out [T, Hq, D] in the dtype of q, or (out, lse).

    Warns:
        RuntimeWarning: once, if kernels of a backend that nobody named cannot be compiled or launched; the next one runs.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; on the CPU also cu_seqlens that are not increasing.
        RuntimeError: a named backend cannot run this call; the message says why.
    """
    del max_seqlen, max_seqlen_k, deterministic  # hints: see above
    check_bool("return_lse", return_lse)
    tensors = (q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k)
    look, plan = recall(tensors, rotary_dim, pair_stride, scale, backend)
    lse: Tensor | None
    if plan is not None:
        out, lse = plan.run(tensors, return_lse)
    else:
        call = checked_call(tensors, rotary_dim, pair_stride, scale)
        backend, fallback = choose_backend("rope_attention", backend, call.q.device, call)
        if backend == "reference" and has_values(call.q):  # else the operators tell the shapes
            out, lse = reference_backend.forward(call)
        else:
            plan = Plan(call, backend, fallback)
            out, lse = attention(plan, call, return_lse)
            keep(look, plan, tensors, call)
    return out if lse is None or not return_lse else (out, lse.to(table_dtype(out.dtype)))
