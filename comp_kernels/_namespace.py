"""The namespace of the operators in torch.ops, the name under which this package is imported, and how one is registered.

It is "comp_kernels" where the package is installed. A loader that imports a copy under another name (Hugging Face `kernels`
does) gets operators of its own, so that several versions can live in one process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = __package__
OPS = getattr(torch.ops, NAMESPACE)
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(name: str, kernel: Callable, fake: Callable, autograd: Callable, setup_context: Callable | None = None) -> None:
    """Give the defined operator `name` its kernel for every device, its shapes for tracing and its autograd rule."""
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", autograd, setup_context=setup_context, lib=LIBRARY)
