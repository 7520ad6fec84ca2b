"""Argument checks shared by the operators: every message names the argument, what came, and what is needed."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {x.dtype} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def check_tensor(name: str, x: object, shape: str, *, dim: int | tuple[int, ...] | None = None) -> None:
    """`x` must be a tensor with the right number of dimensions; `shape` spells the expected shape for the message."""
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(x, Tensor) or (dims is not None and x.dim() not in dims):
        raise ValueError(f"{name} must be a tensor {shape}, got {describe(x)}")


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_same(name: str, x: Tensor, like_name: str, like: Tensor, *, dtype: bool = True) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {x.device}")
    if dtype and x.dtype != like.dtype:
        raise ValueError(f"{name} must have dtype {like.dtype} like {like_name}, got {x.dtype}")


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
