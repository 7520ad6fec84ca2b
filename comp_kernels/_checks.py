"""Argument checks shared by the operators: every message names the argument, what came, and what is needed."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from ._backends import transforms_active

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        if x.is_nested:  # some have no shape to ask for
            return f"a nested tensor of {x.dtype} on {x.device}"
        return f"{tuple(x.shape)} {x.dtype} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def check_tensor(
    name: str,
    x: object,
    shape: str,
    *,
    dim: int | tuple[int, ...] | None = None,
    floating: bool = False,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """`x` must be a tensor with the right number of dimensions, of a float dtype, with device and dtype of the tensor `like`
    (name, tensor), as far as asked for; `shape` spells the expected shape for the message."""
    if (
        not isinstance(x, Tensor)
        or x.is_nested
        or (dim is not None and x.dim() != dim and (isinstance(dim, int) or x.dim() not in dim))
    ):
        raise ValueError(f"{name} must be a tensor {shape}, got {describe(x)}")
    if type(x) is not Tensor and is_sharded(x):
        raise ValueError(f"{name} must be a tensor of this process, got a DTensor {describe(x)}: pass {name}.to_local()")
    if floating and x.dtype not in FLOAT_DTYPES:
        check_float(name, x)
    if like is not None and (x.dtype != like[1].dtype or x.device != like[1].device):
        check_same(name, x, *like)


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor, for which the operators have no rules: their sequences and sums cross its shards."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one who has not imported it
    return module is not None and isinstance(x, module.DTensor)


def check_dense(name: str, x: Tensor) -> None:
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got layout {x.layout}: pass {name}.to_dense()")


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_real(name: str, x: Tensor) -> None:
    """Integers and booleans that torch compares, and floats that arithmetic knows."""
    if x.is_complex():
        raise ValueError(f"{name} must be real, got {x.dtype}")
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise ValueError(f"{name} must not be {x.dtype}, of which torch has little arithmetic: pass {name}.to(torch.int64)")
    if x.is_floating_point():
        check_float(name, x)


def check_same(name: str, x: Tensor, like_name: str, like: Tensor, *, dtype: bool = True) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {x.device}")
    if dtype and x.dtype != like.dtype:
        raise ValueError(f"{name} must have dtype {like.dtype} like {like_name}, got {x.dtype}")


def check_number(name: str, value: object) -> None:
    """A number of Python (or NumPy). A tensor is refused: settings are not differentiated, its gradient would be lost."""
    if not isinstance(value, (float, int, numbers.Real, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"{name} must be a number, not a tensor (it receives no gradient), got {describe(value)}")


def check_integer(name: str, value: int, least: int | None = None) -> None:
    if not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise ValueError(f"{name} must be an integer, got {describe(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive(name: str, value: float) -> float:
    """A positive number, as a float of Python: the kernels' schemas take neither NumPy's nor integers beyond 64 bits."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if value == float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value) if not isinstance(value, float) and isinstance(value, numbers.Real) else value


# What leaves 2**27 of the computing dtype's range (2**23 of float64's) to the numbers that a setting multiplies or divides.
LARGEST_SETTING = {torch.float32: 2.0**100, torch.float64: 2.0**1000}


def check_size(name: str, value: float, dtype: torch.dtype) -> None:
    """Finite, with room for arithmetic in the computing dtype of tensors of `dtype`."""
    compute = torch.promote_types(dtype, torch.float32)
    most = LARGEST_SETTING[compute]
    if not abs(value) <= most:  # so does NaN
        where = f"arithmetic in {name_of(compute)}"
        raise ValueError(f"{name} must be finite and at most {most:.2g} in size for {where}, got {value}")


def check_temperature(name: str, value: float, dtype: torch.dtype, *, of_cosines: bool = False) -> float:
    """A positive number that scores are divided by in the computing dtype of tensors of `dtype`. Cosines are equal up to its
    rounding: a temperature below tells nothing but that."""
    value = check_positive(name, value)
    compute = torch.promote_types(dtype, torch.float32)
    most = LARGEST_SETTING[compute]
    least = torch.finfo(compute).eps if of_cosines else 1 / most
    if not least <= value <= most:
        what = f"{'cosines' if of_cosines else 'arithmetic'} in {name_of(compute)}"
        raise ValueError(f"{name} must be between {least:.2g} and {most:.2g} for {what}, got {value}")
    return value


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {describe(value)}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_num_iters(num_iters: int) -> None:
    check_integer("num_iters", num_iters, least=1)
    if num_iters >= 2**31:
        raise ValueError(f"num_iters must be less than 2**31, got {num_iters}")


def check_group(group: object) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a torch.distributed.ProcessGroup or None, got {describe(group)}")


def of_inference_mode(x: Tensor | None) -> bool:
    """Whether autograd would refuse to keep it: made in inference mode, which is over."""
    return x is not None and x.is_inference() and not torch.is_inference_mode_enabled()


def keepable(x: Tensor) -> Tensor:
    """x, or a copy where autograd would refuse to keep it."""
    return x.clone() if not torch.compiler.is_compiling() and of_inference_mode(x) else x


def has_values(x: Tensor) -> bool:
    """Whether there is anything but a shape: neither on the meta device nor of FakeTensorMode."""
    return not x.is_meta and (torch.compiler.is_compiling() or not isinstance(x, torch._subclasses.FakeTensor))


def readable(x: Tensor) -> bool:
    """Whether values may be looked at: not on a GPU, which would be waited for, and not where they are yet to come."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and has_values(x) and not transforms_active()
