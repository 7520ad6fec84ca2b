"""The public rope_attention: argument checks, defaults, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends import choose_backend, implementation
from ..._checks import check_dense, check_float, check_integer, check_number, check_same, check_tensor, has_values
from . import reference
from .registration import attention


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
        cos, sin:  [T, R] or, per head, [T, Hq, R] with R = rotary_dim; or half as wide, one value per pair.
            None: no rotation. float32 is best; narrower dtypes are widened. Rows of (1, 0) leave a token as it is
            (CLS, registers). The table need not be a rotation: gradients use the true transpose.
        cu_seqlens:  [B + 1] int32 or int64, sequence b owns rows cu_seqlens[b]:cu_seqlens[b + 1]. Empty sequences are
            fine. Rows from cu_seqlens[-1] on are never read; their out and gradients are zero. None: one sequence of all rows.
        max_seqlen, max_seqlen_k:  hints, accepted for drop-in use and never needed.
        rotary_dim:  channels that turn, default D.
        pair_stride:  channels between the two of a pair: default rotary_dim / 2 ("rotate half"); 1 is "interleaved".
        cos_k, sin_k:  tables of the keys, [Tk, R] or [Tk, Hkv, R], or half as wide. Default: those of the queries.
        cu_seqlens_k:  [B + 1], key sequences for cross attention. Default: those of the queries.
        scale:  softmax scale, default D ** -0.5. A number; for one that is learned multiply q by it.
        return_lse:  also return lse [Hq, T], float32 (float64 for float64 inputs); -inf for rows without keys.
        deterministic:  the gradients are bit-equal from run to run; every backend does this at no extra cost today.
        backend:  "reference", "cpu", "triton", "cuda" or None (by device; see comp_kernels.available_backends).

    Returns:
        out [T, Hq, D] in the dtype of q, or (out, lse).

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; on the CPU also cu_seqlens that are not increasing.
        RuntimeError: a named backend cannot run this call; the message says why.
    """
    del max_seqlen, max_seqlen_k, deterministic  # hints: see above
    check_tensor("q", q, "[T, Hq, D]", dim=3)
    check_tensor("k", k, "[Tk, Hkv, D]", dim=3)
    check_tensor("v", v, "[Tk, Hkv, D]", dim=3)
    q, k, v = autocast(q, k, v)
    rotary_dim, pair_stride = check_arguments(
        q, k, v, cos, sin, cu_seqlens, rotary_dim, pair_stride, cos_k, sin_k, cu_seqlens_k
    )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        check_number("scale", scale)
        scale = float(scale)
    if cos is not None and cos_k is None:
        cos_k, sin_k = cos, sin
    elif cos is not None and cos_k.shape[-1] != cos.shape[-1]:  # the kernels know one width
        cos, sin, cos_k, sin_k = (reference.widen_table(x, rotary_dim, pair_stride) for x in (cos, sin, cos_k, sin_k))

    def declines(name: str) -> str | None:
        if name == "reference":
            return None
        module = implementation("rope_attention", name)
        return module.declines(q, k, v, cos, sin, cos_k, sin_k, rotary_dim=rotary_dim, pair_stride=pair_stride)

    backend = choose_backend("rope_attention", backend, q.device, declines)
    if backend == "reference" and has_values(q):  # else the operators tell the shapes
        check_all_dense(q, k, v)
        with torch.autocast(q.device.type, enabled=False):  # the definition is float32 arithmetic
            return reference.rope_attention(
                q,
                k,
                v,
                cos,
                sin,
                cu_seqlens,
                rotary_dim=rotary_dim,
                pair_stride=pair_stride,
                cos_k=cos_k,
                sin_k=sin_k,
                cu_seqlens_k=cu_seqlens_k,
                scale=scale,
                return_lse=return_lse,
            )
    cu_seqlens_k = normalised_bounds(cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, k)
    cu_seqlens = normalised_bounds(cu_seqlens, q)
    try:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    except RuntimeError:  # asked here alone, it costs the calls that are right nothing
        check_all_dense(q, k, v)
        raise
    table_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin, cos_k, sin_k = (contiguous(table, table_dtype) for table in (cos, sin, cos_k, sin_k))
    out, lse = attention(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, rotary_dim, pair_stride, scale, backend)
    return (out, lse.to(table_dtype)) if return_lse else out


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, q, k, v in its dtype, as for torch's own attention; the tables keep theirs. float64 is left alone."""
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))


def normalised_bounds(cu_seqlens: Tensor | None, x: Tensor) -> Tensor:
    """cu_seqlens as contiguous int32; [0, number of tokens of x] for None."""
    if cu_seqlens is None:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.tensor((0, x.shape[0]), dtype=torch.int32)
        # Elsewhere without waiting for a copy from the host; in a graph for any number of tokens.
        return torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
    if cu_seqlens.dtype == torch.int64:
        # A bound beyond int32 must not come back as a small one: in a compiled graph the kernel's own check sees this alone.
        limits = torch.iinfo(torch.int32)
        cu_seqlens = cu_seqlens.clamp(limits.min, limits.max)
    return contiguous(cu_seqlens, torch.int32)


def check_all_dense(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dense(name, x)


def contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x.to(dtype).contiguous(), without the calls where there is nothing to do."""
    return x if x is None or (x.dtype == dtype and x.is_contiguous()) else x.to(dtype).contiguous()


def check_arguments(q, k, v, cos, sin, cu_seqlens, rotary_dim, pair_stride, cos_k, sin_k, cu_seqlens_k) -> tuple[int, int]:
    """Refuse what does not fit together; return rotary_dim and pair_stride with their defaults filled in."""
    check_float("q", q)
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    num_heads, head_dim = q.shape[1:]
    if head_dim == 0:
        raise ValueError(f"q must be [T, Hq, D] with a head size D of at least 1, got {tuple(q.shape)}")
    if k.shape != v.shape or k.shape[2] != head_dim:
        raise ValueError(
            f"k and v must both be [Tk, Hkv, D] with D = {head_dim} as in q {tuple(q.shape)}, "
            f"got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or num_heads % k.shape[1] != 0:
        raise ValueError(f"k must have a number of heads that divides the {num_heads} heads of q, got {k.shape[1]}")

    if cu_seqlens_k is not None and cu_seqlens is None:
        raise ValueError("cu_seqlens_k needs cu_seqlens: give both for cross attention, or neither for one sequence")
    for name, bounds, tokens in (
        ("cu_seqlens", cu_seqlens, q.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0]),
    ):
        if bounds is not None:
            check_cu_seqlens(name, bounds, tokens, q.device)
    if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens ({cu_seqlens.shape[0]}), got {cu_seqlens_k.shape[0]}"
        )
    if cu_seqlens is not None and cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"k must have as many tokens as q ({q.shape[0]}) when both use cu_seqlens, got {k.shape[0]}; "
            "pass cu_seqlens_k for cross attention"
        )

    if rotary_dim is None:
        rotary_dim = head_dim if cos is not None else max(head_dim // 2 * 2, 2)  # nothing turns: any even number will do
    else:
        check_integer("rotary_dim", rotary_dim)
    if not 0 < rotary_dim <= max(head_dim, 2) or rotary_dim % 2 != 0:
        raise ValueError(f"rotary_dim must be even, positive and at most D = {head_dim}, got {rotary_dim}")
    if pair_stride is None:
        pair_stride = rotary_dim // 2
    else:
        check_integer("pair_stride", pair_stride)
    if pair_stride <= 0 or rotary_dim % (2 * pair_stride) != 0:
        raise ValueError(
            f"pair_stride must be positive and 2 * pair_stride must divide rotary_dim = {rotary_dim}, got {pair_stride}"
        )
    if cos is None and cos_k is not None:
        raise ValueError("cos_k needs cos: to rotate keys only, pass cos of ones and sin of zeros for the queries")
    check_tables(("cos", cos), ("sin", sin), q.shape[0], num_heads, rotary_dim, q)
    check_tables(("cos_k", cos_k), ("sin_k", sin_k), k.shape[0], k.shape[1], rotary_dim, q)
    if cos is not None and cos_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"cos_k and sin_k are needed when k has other tokens than q: k {tuple(k.shape)}, q {tuple(q.shape)}"
            )
        if cos.dim() == 3 and k.shape[1] != num_heads:
            raise ValueError(
                f"cos_k and sin_k are needed when cos has one table per query head ({num_heads}) and k has {k.shape[1]} heads"
            )
    return rotary_dim, pair_stride


def check_tables(cos: tuple, sin: tuple, num_tokens: int, num_heads: int, rotary_dim: int, q: Tensor) -> None:
    """Check one (cos, sin) pair, each given as (name, tensor or None)."""
    (cos_name, cos), (sin_name, sin) = cos, sin
    if (cos is None) != (sin is None):
        missing, given = (cos_name, sin_name) if cos is None else (sin_name, cos_name)
        raise ValueError(f"{missing} is missing: {given} was given, and cos and sin come in pairs")
    if cos is None:
        return
    for name, table in ((cos_name, cos), (sin_name, sin)):
        check_tensor(name, table, "[T, R] or [T, H, R]", dim=(2, 3))
        check_dense(name, table)
        check_float(name, table)
        check_same(name, table, "q", q, dtype=False)
        if table.dtype == torch.float64 and q.dtype != torch.float64:
            raise ValueError(f"{name} is float64 but q is {q.dtype}: tables are used in float32 then, pass {name}.float()")
        fits = table.shape[0] == num_tokens and table.shape[-1] in (rotary_dim, rotary_dim // 2)
        if not fits or (table.dim() == 3 and table.shape[1] != num_heads):
            wanted = [(num_tokens, width) for width in (rotary_dim, rotary_dim // 2)]
            wanted += [(num_tokens, num_heads, width) for width in (rotary_dim, rotary_dim // 2)]
            raise ValueError(
                f"{name} must have one of the shapes {wanted} (tokens, [heads,] rotary_dim or rotary_dim / 2), "
                f"got {tuple(table.shape)}"
            )
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"{cos_name} and {sin_name} must have the same shape and dtype, "
            f"got {tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> None:
    """[B + 1] integers from 0, never decreasing, at most num_tokens; values are looked at on the CPU only (no device sync)."""
    check_tensor(name, cu_seqlens, "[B + 1] of int32 or int64", dim=1)
    check_dense(name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {cu_seqlens.device}")
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must have at least one entry, the leading 0")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            bounds = cu_seqlens.tolist()
        except RuntimeError as error:
            if not has_values(cu_seqlens):
                return
            raise ValueError(f"{name} must be the same for all of a batch under torch.func transforms: {error}") from None
        if bounds[0] != 0 or bounds[-1] > num_tokens or any(a > b for a, b in zip(bounds, bounds[1:])):
            raise ValueError(
                f"{name} must start at 0, never decrease and end at or below the {num_tokens} tokens, got {bounds}"
            )
