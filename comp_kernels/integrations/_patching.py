"""Swapping the forward of attention modules in place and back again; knows nothing of any model library."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Protocol, SupportsIndex

from torch import nn

from .._backends import check_backend


class UnsupportedCall(ValueError):
    """A call that `rope_attention` cannot serve: attention dropout, a mask without block structure, attention weights."""


Foreign = Any
"""A module of another library. What is read from it is looked for when it is patched (`Family.attributes`); no type says it."""


class Family(Protocol):
    """Attention modules that share one forward."""

    @property
    def classes(self) -> tuple[str, ...]:
        """ "qwen2_vl.VisionAttention": last part of the module's name, class."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the positional parameters of `forward`, in order."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """What `run` reads from the module."""

    def run(self, module: Foreign, arguments: dict[str, Any], backend: str | None) -> Any:
        """What the module's forward returns. Raises UnsupportedCall before anything is computed."""


@dataclass(frozen=True)
class Patch:
    """Kept on a patched module, as `_comp_kernels_patch`: how it runs now."""

    family: Family
    backend: str | None
    on_unsupported: str


class Patched:
    """What the classes of patched modules have in common."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Copied and pickled as the library's class that is patched: ours have no name that can be imported."""
        reduced = super().__reduce_ex__(max(2, operator.index(protocol)))
        assert not isinstance(reduced, str)  # the name of a global, which no module is
        return _new_patched, (library_class(type(self)),), *reduced[2:]


@cache
def patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """`original` with our forward, which runs on the module it is called on: copies and replicas have weights of their own.

    Without a patch on the module (unpatched, and a wrapper of another library still calls this) it is the original's.
    """

    @wraps(original.forward)
    def forward(self: nn.Module, *args, **kwargs):
        patch: Patch | None = getattr(self, "_comp_kernels_patch", None)
        if patch is None:
            return original.forward(self, *args, **kwargs)
        try:
            return patch.family.run(self, dict(zip(patch.family.parameters, args)) | kwargs, patch.backend)
        except UnsupportedCall:
            if patch.on_unsupported == "error":
                raise
            return original.forward(self, *args, **kwargs)

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (Patched, original), names | {"forward": forward})


def library_class(cls: type) -> type:
    """The class below ours, and `cls` itself where it is not patched."""
    return cls.__mro__[cls.__mro__.index(Patched) + 1] if issubclass(cls, Patched) else cls


def _new_patched(original: type) -> nn.Module:
    cls = patched_class(original)
    return cls.__new__(cls)


def patch_modules(
    model: nn.Module,
    families: Iterable[Family],
    *,
    library: str,
    backend: str | None,
    on_unsupported: str,
    skip: Callable[[nn.Module], bool] = lambda module: False,
) -> list[str]:
    """Patch every module of `model` whose forward a family knows; names of the patched modules. ValueError if there is none."""
    if on_unsupported not in ("error", "original"):
        raise ValueError(f"on_unsupported must be 'error' or 'original', got {on_unsupported!r}")
    check_backend("backend", backend)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    by_class = {name: family for family in families for name in family.classes}
    unpatch(model)
    patched = []
    for name, module in model.named_modules():
        family = by_class.get(defining_class(module, library) or "")
        if family is None or skip(module):
            continue
        missing = [attribute for attribute in family.attributes if not hasattr(module, attribute)]
        if missing:
            unpatch(model)
            raise ValueError(
                f"{name}: this version of {library} arranges {type(module).__name__} differently, it has no {missing}"
            )
        if "forward" in module.__dict__ and not isinstance(module, Patched):  # else a later library wrapped ours
            unpatch(model)
            raise ValueError(
                f"{name}: its forward was replaced on the instance, as accelerate's offloading does, by {module.forward!r}: "
                "patch the model first and let other libraries wrap it then"
            )
        if not isinstance(module, Patched):
            original: type = type(module)
            module.__class__ = patched_class(original)
        module._comp_kernels_patch = Patch(family, backend, on_unsupported)
        patched.append(name)
    if not patched:
        known, found = ", ".join(sorted(by_class)), ", ".join(attention_classes(model))
        raise ValueError(
            f"model: {type(model).__name__} has no attention module that is known here; it has {found}. "
            f"Known for {library}: {known}. For a model of your own see docs/usage.md."
        )
    return patched


def unpatch(model: nn.Module) -> list[str]:
    """Undo `patch_transformers` or `patch_timm` on every module of `model`; names of the modules that changed back.

    A wrapper of `forward` that another library put on later stays, around the module's own forward.
    """
    restored = []
    for name, module in model.named_modules():
        if module.__dict__.pop("_comp_kernels_patch", None) is None:
            continue
        wrapped = "forward" in module.__dict__  # by another library, which may hold our forward
        if type(module).__bases__[0] is Patched and not wrapped:  # else it runs the original's for lack of a patch
            module.__class__ = library_class(type(module))
        restored.append(name)
    return restored


def defining_class(module: nn.Module, library: str) -> str | None:
    """Where the forward of `module` is defined, as "qwen2_vl.VisionAttention"; None if that is outside `library`.

    A subclass that inherits forward counts as its parent, one that overrides it does not.
    """
    function = type(module).forward
    if function.__module__.split(".")[0] != library:
        return None
    return f"{function.__module__.split('.')[-1].removeprefix('modeling_')}.{function.__qualname__.split('.')[0]}"


def attention_classes(model: nn.Module) -> list[str]:
    """Classes that look like attention, with the last part of their module's name: libraries use a class name many times."""
    names = {f"{type(m).__module__.split('.')[-1].removeprefix('modeling_')}.{type(m).__name__}" for m in model.modules()}
    found = sorted(name for name in names if re.search("attention|attn", name.split(".")[1], re.IGNORECASE))
    return found or ["no attention module"]
