"""Files of a model folder, read so that damage is named: JSON objects, and tensors of safetensors and pickled files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..files import is_lfs_pointer

INTEGERS_AND_COMPLEX = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64", "C128")
"""Types of a safetensors header that are no weights, unless the configuration names a quantisation."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError with path and cause where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {pointer_or_size(path)}: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {json.dumps(content)[:80]}")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The files that are a directory's weights, by the rule of transformers: model.safetensors, else what its index names, else
    the same for pytorch_model.bin. Others beside them (a moving average, another library's format) are not read."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).is_file():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            names = read_object(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"{index} must have a weight_map from tensors to files, got {json.dumps(names)[:80]}")
            names = sorted(set(names.values()))
            if missing := [name for name in names if not (directory / name).is_file()]:
                raise ValueError(f"{index} names {missing}, which {directory} does not hold")
            return [directory / name for name in names]
    raise ValueError(
        "path must hold model.safetensors or pytorch_model.bin, or the index of their parts, "
        f"{directory} has {sorted(path.name for path in directory.iterdir())}"
    )


def open_weights(path: Path) -> dict[str, Any]:
    """Name of each tensor of a file -> the tensor, or the open safetensors file that has it (`get_tensor`, `get_slice`).

    Raises ValueError with path, size and cause for what is no such file: a pointer of git-lfs, one that is cut off, another
    format.
    """
    try:
        if path.suffix == ".safetensors":
            opened = safe_open(path, framework="pt")
            return dict.fromkeys(opened.keys(), opened)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # the readers raise SafetensorError, UnpicklingError, RuntimeError, EOFError and others
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} {pointer_or_size(path)}: {cause}") from error
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"{path} must hold tensors by name, got {describe(held)}")
    return dict(held)


def check_weights(directory: Path, *, quantized: bool = False) -> None:
    """Open every weight file of a folder whose reading is left to transformers. ValueError as `open_weights`, and for weights
    that are no floating-point numbers where the configuration does not say that they are quantized."""
    for path in weight_files(directory):
        for name, held in open_weights(path).items():
            if isinstance(held, Tensor):
                kind, is_float = held.dtype, held.is_floating_point()
            else:
                kind = held.get_slice(name).get_dtype()
                is_float = kind not in INTEGERS_AND_COMPLEX
            if name.endswith("weight") and not is_float and not quantized:
                raise ValueError(f"{path}: {name} must be of floating-point numbers, got {kind}")


def warn_of_non_finite(path: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Say which weights are NaN or infinite: training would end at its first step without a reason."""
    names = [name for name, tensor in tensors if not _is_finite(tensor)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(f"{path}: not all numbers are finite in {', '.join(names[:3])}{more}", stacklevel=3)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or not tensor.is_floating_point():
        return True
    return bool((tensor if tensor.dtype.itemsize > 1 else tensor.float()).isfinite().all())


def pointer_or_size(path: Path) -> str:
    """What can be said of a file that cannot be read."""
    size = path.stat().st_size
    if is_lfs_pointer(path):
        return f"is a pointer of git-lfs ({size} bytes), not the file itself; `git lfs pull` fetches it"
    if size == 0:
        return "is empty"
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" and len(start) > 8 and 0 < int.from_bytes(start[:8], "little") + 8 > size:
        if start[8:9] == b"{":
            return f"is cut off in its header ({size} bytes)"
        return f"is no safetensors file ({size} bytes)"
    return f"cannot be read, it is damaged or cut off ({size} bytes)"


def describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {type(entry).__name__}" for name, entry in list(value.items())[:3]) + ", ...}"
    return type(value).__name__


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
