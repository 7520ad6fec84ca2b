"""One call of rope_attention: the arguments checked, with defaults filled in, laid out as kernels read them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import check_dense, check_integer, check_number, check_size, check_tensor, has_values, keepable
from . import reference


class Call(NamedTuple):
    """What a backend is asked to compute. The fields stand in the order of the operator's schema."""

    q: Tensor  # [T, Hq, D], any token and head stride, last dimension contiguous
    k: Tensor  # [Tk, Hkv, D], Hkv divides Hq
    v: Tensor  # [Tk, Hkv, D]
    cos: Tensor | None  # [T, W] or [T, Hq, W], W = rotary_dim or half of it, contiguous, of `table_dtype`; None: no rotation
    sin: Tensor | None
    cos_k: Tensor | None  # [Tk, W] or [Tk, Hkv, W]
    sin_k: Tensor | None
    cu_seqlens: Tensor | None  # [B + 1] int32, contiguous; None, which kernels never get: one sequence of all rows
    cu_seqlens_k: Tensor | None
    rotary_dim: int
    pair_stride: int
    scale: float

    @property
    def strides(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.q.stride(), self.k.stride(), self.v.stride()

    @property
    def device(self) -> torch.device:
        return self.q.device


Tensors = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]
"""The first nine fields of a Call."""


def shared_once(call: Call) -> Tensors:
    """Its tensors, with None for what keys have from the queries: torch takes its time for each."""
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k = call[:9]
    if cos_k is cos and sin_k is sin:
        cos_k = sin_k = None
    return q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, None if cu_seqlens_k is cu_seqlens else cu_seqlens_k


def call_of(tensors: Iterable[Tensor | None], settings: tuple[int, int, float]) -> Call:
    """The call of which these are `shared_once`."""
    fields: Any = tensors
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k = fields
    if cos_k is None:
        cos_k, sin_k = cos, sin
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    return Call(q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k, *settings)


MAX_TOKENS = 2**31  # or more are beyond int32 bounds


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of tables, and of the lse that a user gets, for q of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_call(tensors: Tensors, rotary_dim: int | None, pair_stride: int | None, scale: float | None) -> Call:
    """Refuse what does not fit together, with a ValueError that names the argument; fill in the defaults, and bring tensors to
    the layout that kernels rely on."""
    q, k, v, cos, sin, cos_k, sin_k, cu_seqlens, cu_seqlens_k = tensors
    q, k, v = checked_qkv(q, k, v)
    cu_seqlens, cu_seqlens_k = checked_bounds(q, k, cu_seqlens, cu_seqlens_k)
    settings = checked_settings(q.shape[2], rotary_dim, pair_stride, scale, rotates=cos is not None, dtype=q.dtype)
    tables = checked_tables(q, k, cos, sin, cos_k, sin_k, *settings[:2])
    return Call(q, k, v, *tables, cu_seqlens, cu_seqlens_k, *settings)


def checked_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype (autocast's, where it is on), each with a contiguous last dimension."""
    check_tensor("q", q, "[T, Hq, D]", dim=3, floating=True)
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = (autocast(x) for x in (q, k, v))
    check_tensor("k", k, "[Tk, Hkv, D]", dim=3, like=("q", q))
    check_tensor("v", v, "[Tk, Hkv, D]", dim=3, like=("q", q))
    _, num_heads, head_dim = q.shape
    _, num_heads_k, head_dim_k = k.shape
    for name, x in (("q", q), ("k", k)):
        if x.shape[0] >= MAX_TOKENS:
            raise ValueError(f"{name} must have fewer than 2**31 tokens, which int32 bounds can tell, got {x.shape[0]}")
    if head_dim == 0:
        raise ValueError(f"q must be [T, Hq, D] with a head size D of at least 1, got {tuple(q.shape)}")
    if k.shape != v.shape or head_dim_k != head_dim:
        raise ValueError(
            f"k and v must both be [Tk, Hkv, D] with D = {head_dim} as in q {tuple(q.shape)}, "
            f"got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if num_heads_k == 0 or num_heads % num_heads_k != 0:
        raise ValueError(f"k must have a number of heads that divides the {num_heads} heads of q, got {num_heads_k}")
    try:
        if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
            q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    except RuntimeError:  # asked here alone, it costs the calls that are right nothing
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_dense(name, x)
        raise
    return q, k, v


def checked_bounds(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both in int32; without bounds of their own the keys have those of the queries. None: one sequence of all rows."""
    num_tokens, num_tokens_k = q.shape[0], k.shape[0]
    if cu_seqlens_k is not None:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens_k needs cu_seqlens: give both for cross attention, or neither for one sequence")
        check_cu_seqlens("cu_seqlens", cu_seqlens, num_tokens, q.device)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, num_tokens_k, q.device)
        if cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_k must have as many entries as cu_seqlens ({cu_seqlens.shape[0]}), got {cu_seqlens_k.shape[0]}"
            )
        return as_int32(cu_seqlens), as_int32(cu_seqlens_k)
    if cu_seqlens is None:
        return None, None
    check_cu_seqlens("cu_seqlens", cu_seqlens, num_tokens, q.device)
    if num_tokens_k != num_tokens:
        raise ValueError(
            f"k must have as many tokens as q ({num_tokens}) when both use cu_seqlens, got {num_tokens_k}; "
            "pass cu_seqlens_k for cross attention"
        )
    bounds = as_int32(cu_seqlens)
    return bounds, bounds


def checked_settings(
    head_dim: int,
    rotary_dim: int | None,
    pair_stride: int | None,
    scale: float | None,
    *,
    rotates: bool,
    dtype: torch.dtype,
) -> tuple[int, int, float]:
    """rotary_dim, pair_stride and scale with their defaults."""
    if rotary_dim is None:
        rotary_dim = head_dim if rotates else max(head_dim // 2 * 2, 2)  # nothing turns: any even number will do
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
    if scale is None:
        scale = head_dim**-0.5
    else:
        check_number("scale", scale)
        scale = float(scale)
        check_size("scale", scale, dtype)
    return rotary_dim, pair_stride, scale


def checked_tables(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    rotary_dim: int,
    pair_stride: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(cos, sin, cos_k, sin_k), contiguous and of `table_dtype`, all four or none; without tables of their own the keys
    have those of the queries."""
    num_tokens, num_heads, _ = q.shape
    num_tokens_k, num_heads_k, _ = k.shape
    if cos is None or sin is None:
        if cos is not sin:
            raise one_table("cos", cos, "sin")
    else:
        check_tables("cos", cos, "sin", sin, (num_tokens, num_heads, rotary_dim), q.dtype, q.device)
    if cos_k is not None or sin_k is not None:
        if cos is None or sin is None:
            raise ValueError("cos_k needs cos: to rotate keys only, pass cos of ones and sin of zeros for the queries")
        if cos_k is None or sin_k is None:
            raise one_table("cos_k", cos_k, "sin_k")
        check_tables("cos_k", cos_k, "sin_k", sin_k, (num_tokens_k, num_heads_k, rotary_dim), q.dtype, q.device)
        if cos_k.shape[-1] != cos.shape[-1]:  # the kernels know one width
            cos, sin, cos_k, sin_k = (reference.widen_table(x, rotary_dim, pair_stride) for x in (cos, sin, cos_k, sin_k))
        cos, sin, cos_k, sin_k = (contiguous(x, table_dtype(q.dtype)) for x in (cos, sin, cos_k, sin_k))
    elif cos is not None and sin is not None:
        if num_tokens_k != num_tokens:
            raise ValueError(
                f"cos_k and sin_k are needed when k has other tokens than q: k {tuple(k.shape)}, q {tuple(q.shape)}"
            )
        if cos.dim() == 3 and num_heads_k != num_heads:
            raise ValueError(
                f"cos_k and sin_k are needed when cos has one table per query head ({num_heads}) and k has {num_heads_k} heads"
            )
        cos, sin = cos_k, sin_k = contiguous(cos, table_dtype(q.dtype)), contiguous(sin, table_dtype(q.dtype))
    return cos, sin, cos_k, sin_k


def autocast(x: Tensor) -> Tensor:
    """Under autocast, q, k and v in its dtype, as for torch's own attention; float64 is left alone, and so are the tables."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def one_table(cos_name: str, cos: Tensor | None, sin_name: str) -> ValueError:
    """For a pair of which one is there."""
    missing, given = (cos_name, sin_name) if cos is None else (sin_name, cos_name)
    return ValueError(f"{missing} is missing: {given} was given, and cos and sin come in pairs")


def check_tables(
    cos_name: str,
    cos: Tensor,
    sin_name: str,
    sin: Tensor,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check one pair of tables; sizes: (tokens, heads, rotary_dim), the rest as q."""
    num_tokens, num_heads, rotary_dim = sizes
    for name, table in ((cos_name, cos), (sin_name, sin)):
        check_tensor(name, table, "[T, R] or [T, H, R]", dim=(2, 3), floating=True)
        check_dense(name, table)
        if table.device != device:
            raise ValueError(f"{name} must be on {device} like q, got {table.device}")
        if table.dtype == torch.float64 != dtype:
            raise ValueError(f"{name} is float64 but q is {dtype}: tables are used in float32 then, pass {name}.float()")
        width = table.shape[-1]
        # Not `in`, by which torch.compile compares a symbolic size with a number as if they were of two kinds.
        fits = table.shape[0] == num_tokens and (width == rotary_dim or width == rotary_dim // 2)
        if not fits or (table.dim() == 3 and table.shape[1] != num_heads):
            wanted: list[tuple[int, ...]] = [(num_tokens, width) for width in (rotary_dim, rotary_dim // 2)]
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
        check_bounds_on_cpu(name, cu_seqlens, num_tokens)


def check_bounds_on_cpu(name: str, cu_seqlens: Tensor | None, num_tokens: int) -> None:
    """The values, of a tensor on the CPU or None."""
    if cu_seqlens is None:
        return
    try:
        bounds = cu_seqlens.tolist()
    except RuntimeError as error:
        if not has_values(cu_seqlens):
            return
        raise ValueError(f"{name} must be the same for all of a batch under torch.func transforms: {error}") from None
    if bounds[0] != 0 or bounds[-1] > num_tokens or bounds != sorted(bounds):
        wrong = 0 if bounds[0] != 0 else next((i for i, (a, b) in enumerate(pairwise(bounds)) if a > b), len(bounds) - 2)
        got = bounds if len(bounds) <= 32 else f"{bounds[wrong : wrong + 2]} at {wrong} of {len(bounds)} entries"
        raise ValueError(f"{name} must start at 0, never decrease and end at or below the {num_tokens} tokens, got {got}")


def contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype).contiguous(), without the calls where there is nothing to do."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def bounds_of_all(num_tokens: int, device: torch.device) -> Tensor:
    """cu_seqlens of one sequence."""
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.tensor((0, num_tokens), dtype=torch.int32, device=device)  # whatever torch's default device is
    # Elsewhere without waiting for a copy from the host; in a graph for any number of tokens.
    return torch.arange(2, dtype=torch.int32, device=device) * num_tokens


def with_bounds(call: Call) -> Call:
    """As kernels get it, which know no call without bounds."""
    if call.cu_seqlens is not None:
        return call
    bounds, bounds_k = (bounds_of_all(x.shape[0], x.device) for x in (call.q, call.k))
    return call._replace(cu_seqlens=bounds, cu_seqlens_k=bounds_k)


def as_int32(cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens, contiguous, as autograd can keep it."""
    cu_seqlens = keepable(cu_seqlens)
    if cu_seqlens.dtype == torch.int64:
        # A bound beyond int32 must not come back as a small one: in a compiled graph the kernel's own check sees this alone.
        limits = torch.iinfo(torch.int32)
        cu_seqlens = cu_seqlens.clamp(limits.min, limits.max)
    return contiguous(cu_seqlens, torch.int32)
