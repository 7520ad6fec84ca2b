"""x [.., C] to q, k and v [.., H, D], as modules of other libraries project it, and what that reads from the module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ._patching import Foreign


def split_heads(module: Foreign, *rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(row.unflatten(-1, (-1, module.head_dim)) for row in rows)


def split_fused(module: Foreign, qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(-3)


def fused_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    return split_fused(module, module.qkv(x))


def fused_normed_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = fused_qkv(module, x)
    return module.q_norm(q), module.k_norm(k), v


def fused_grouped_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    return split_heads(module, *module.qkv(x).split((module.q_dim, module.kv_dim, module.kv_dim), -1))


def separate_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    return split_heads(module, module.q_proj(x), module.k_proj(x), module.v_proj(x))


def separate_short_names_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    return split_heads(module, module.q(x), module.k(x), module.v(x))


def normed_qkv(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = separate_qkv(module, x)
    return module.q_norm(q), module.k_norm(k), module.v_norm(v)


def normed_qk(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = separate_qkv(module, x)
    return module.q_norm(q), module.k_norm(k), v


def normed_before_heads_qk(module: Foreign, x: Tensor) -> tuple[Tensor, ...]:
    return split_heads(module, module.q_norm(module.q_proj(x)), module.k_norm(module.k_proj(x)), module.v_proj(x))


SEPARATE, NORMS = ("q_proj", "k_proj", "v_proj", "head_dim"), ("q_norm", "k_norm")
READS: dict[Callable, tuple[str, ...]] = {
    fused_qkv: ("qkv", "num_heads"),
    fused_normed_qkv: ("qkv", "num_heads", *NORMS),
    fused_grouped_qkv: ("qkv", "q_dim", "kv_dim", "head_dim"),
    separate_qkv: SEPARATE,
    separate_short_names_qkv: ("q", "k", "v", "head_dim"),
    normed_qkv: (*SEPARATE, *NORMS, "v_norm"),
    normed_qk: (*SEPARATE, *NORMS),
    normed_before_heads_qk: (*SEPARATE, *NORMS),
}
"""What each of them reads from the module."""
