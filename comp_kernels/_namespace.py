"""The namespace of the operators in torch.ops, the name under which this package is imported, and how one is registered.

It is "comp_kernels" where the package is installed. A loader that imports a copy under another name (Hugging Face `kernels`
does) gets operators of its own, so that several versions can live in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

NAMESPACE = __package__
OPS = getattr(torch.ops, NAMESPACE)
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
PLAIN = (torch.Tensor, torch.nn.Parameter)


def watched(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether anything but autograd follows calls of operators on these tensors.

    If not, torch's dispatcher has nothing to add to a call, and going through it from Python and back takes about as long as
    all the rest of a call on a few tokens.
    """
    return followed() or not are_plain(tensors)


def followed() -> bool:
    """Whether calls of operators are compiled or traced now, or followed by a mode (FLOP counter, fake tensors) or the
    profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
    )


def are_plain(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether tensors are no more than their memory: no class of their own, no batch of gradients, no lazily negated view, no
    zeros without any memory (forward-mode differentiation makes those)."""
    for x in tensors:  # a plain loop: any() over a generator takes twice as long
        if x is not None and (type(x) not in PLAIN or x.is_neg() or x._is_zerotensor() or not torch._C._has_storage(x)):
            return False
    return True


def past_the_dispatcher(kernel: Callable, setup_context: Callable, autograd: Callable) -> Callable:
    """An operator's kernel with its autograd rule for calls that are not `watched`. To be called with the tensors that may
    receive gradients, in the operator's order, and then with all of its arguments as one tuple."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            output = kernel(*arguments[-1])
            setup_context(ctx, arguments[-1], output)
            return output

        @staticmethod
        def backward(ctx, *cotangents):
            return autograd(ctx, *cotangents)

    return Direct.apply


def register(name: str, kernel: Callable, fake: Callable, autograd: Callable, setup_context: Callable | None = None) -> Any:
    """The defined operator `name`, with its kernel for every device, its shapes for tracing and its autograd rule."""
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", autograd, setup_context=setup_context, lib=LIBRARY)
    return getattr(OPS, name)
