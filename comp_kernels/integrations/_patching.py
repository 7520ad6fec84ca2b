"""Swapping the forward of attention modules in place and back again; knows nothing of any model library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from .._backends import check_backend


class UnsupportedCall(ValueError):
    """A call that `rope_attention` cannot serve: attention dropout, a mask without block structure, attention weights."""


class Family(Protocol):
    """Attention modules that share one forward."""

    classes: tuple[str, ...]  # "qwen2_vl.VisionAttention": last part of the module's name, class
    parameters: tuple[str, ...]  # names of the positional parameters of `forward`, in order
    attributes: tuple[str, ...]  # what `run` reads from the module

    def run(self, module: nn.Module, arguments: dict[str, Any], backend: str | None) -> Any:
        """What the module's forward returns. Raises UnsupportedCall before anything is computed."""


@dataclass
class Patch:
    """Kept on a patched module: how it runs now."""

    family: Family
    backend: str | None
    on_unsupported: str
    active: bool = True  # False: unpatched, but a wrapper that another library put on later still calls `forward`


def forward(self: nn.Module, *args, **kwargs):
    """The forward of a patched module, set as a partial of it: copied and pickled, that runs on the weights of the copy."""
    patch: Patch = self._comp_kernels_patch
    if not patch.active:
        return type(self).forward(self, *args, **kwargs)
    try:
        return patch.family.run(self, dict(zip(patch.family.parameters, args)) | kwargs, patch.backend)
    except UnsupportedCall:
        if patch.on_unsupported == "error":
            raise
        return type(self).forward(self, *args, **kwargs)


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
        family = by_class.get(defining_class(module, library))
        if family is None or skip(module):
            continue
        missing = [attribute for attribute in family.attributes if not hasattr(module, attribute)]
        if missing:
            unpatch(model)
            raise ValueError(
                f"{name}: this version of {library} arranges {type(module).__name__} differently, it has no {missing}"
            )
        wrapped = "_comp_kernels_patch" in module.__dict__  # by a later library, around our forward
        if "forward" in module.__dict__ and not wrapped:
            unpatch(model)
            raise ValueError(
                f"{name}: its forward was replaced on the instance, as accelerate's offloading does, by {module.forward!r}: "
                "patch the model first and let other libraries wrap it then"
            )
        module._comp_kernels_patch = Patch(family, backend, on_unsupported)
        if not wrapped:
            module.forward = partial(forward, module)
        patched.append(name)
    if not patched:
        raise ValueError(
            f"model: {type(model).__name__} has no attention module that is known here; it has {attention_classes(model)}. "
            f"Known for {library}: {', '.join(sorted(by_class))}. For a model of your own see docs/usage.md."
        )
    return patched


def unpatch(model: nn.Module) -> list[str]:
    """Undo `patch_transformers` or `patch_timm` on every module of `model`; names of the modules that changed back.

    A wrapper of `forward` that another library put on later stays, around the module's own forward.
    """
    restored = []
    for name, module in model.named_modules():
        patch = module.__dict__.get("_comp_kernels_patch")
        if patch is None or not patch.active:
            continue
        current = module.__dict__.get("forward")
        if current is None or (isinstance(current, partial) and current.func is forward):
            module.__dict__.pop("forward", None)
            del module._comp_kernels_patch
        else:
            patch.active = False
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
    names = {type(module).__name__ for module in model.modules()}
    return sorted(name for name in names if "attention" in name.lower() or "attn" in name.lower()) or ["no attention module"]
