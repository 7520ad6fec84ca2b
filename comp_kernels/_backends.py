"""Which backend runs an operator: `backend=None` picks by device, a named backend is used or refused with the reason.

A backend is a module of the operator's folder that keeps the contract of `Backend`; it is listed in `IMPLEMENTATIONS` once it
exists. Where kernels turn out not to compile or launch, a choice made by device goes on to the next backend (`function_of`).
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "COMP_KERNELS_BACKEND"


class Backend(Protocol):
    """What a backend of any operator answers. `call` is the operator's `Call`: its tensors and settings, checked."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """Why nothing can run on `device` here, in words for the user; None when it can. Imports no compiler."""

    def declines(self, call: Any) -> str | None:
        """Why this call cannot be served (a dtype, a head size), or None."""

    def forward(self, call: Any) -> tuple[torch.Tensor, ...]:
        """The operator's results."""

    # An operator whose gradient is a kernel too (rope_attention) asks for `backward(call, ...)` as well. A backend with kernels
    # that no hardware has run yet says for which calls: `unmeasured(call)`, true or false. One of rope_attention may have
    # `passes(call)`: both passes prepared for calls that look alike, as `native.Passes`, or None.


# operator -> backend -> module of this package that is a Backend
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "rope_attention": {
        "reference": ".ops.rope_attention.reference_backend",
        "cpu": ".ops.rope_attention.cpu",
        "triton": ".ops.rope_attention.triton_backend",
        "cuda": ".ops.rope_attention.cuda",
    },
    "sinkhorn": {
        "reference": ".ops.sinkhorn.reference_backend",
        "cpu": ".ops.sinkhorn.cpu",
        "triton": ".ops.sinkhorn.triton_backend",
        "cuda": ".ops.sinkhorn.cuda",
    },
    "alignment_loss": {
        "reference": ".ops.alignment_loss.reference_backend",
        "cpu": ".ops.alignment_loss.cpu",
        "triton": ".ops.alignment_loss.triton_backend",
    },
}

_loaded: dict = {}  # module path -> module

# Order of preference per device type; the first that can run is taken, the reference always can.
PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),  # as measured on an H200, docs/kernels/rope_attention_cuda.md
}
# Backends that are compiled or launched when they are called, and so may fail where nothing is wrong with the call.
LAUNCHED = ("triton", "cuda")

_failures: dict[tuple[str, str, torch.device], str] = {}  # (operator, backend, device) -> what its kernels failed with


def implementation(op: str, backend: str) -> Any:
    """The Backend that implements `op` on `backend`; imported on first use, so that `import comp_kernels` stays light."""
    path = IMPLEMENTATIONS[op][backend]
    if path not in _loaded:
        _loaded[path] = importlib.import_module(path, __package__)
    return _loaded[path]


def unavailable_reason(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run `op` on `device`, in words for the user; None when it can."""
    if backend not in IMPLEMENTATIONS[op]:
        return f"{op} has no {backend} implementation"
    return implementation(op, backend).unavailable_reason(device)


def load(op: str) -> bool:
    """Import all backends of `op`: before torch.compile reads `_loaded`, for what comes later tracing does not see."""
    for backend in IMPLEMENTATIONS[op]:
        implementation(op, backend)
    return True


# torch.compile takes their answers as constants: tracing itself could not import a module. This is what
# torch.compiler.assume_constant_result sets, without importing the whole compiler for it (half of torch's own import time).
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def preferred(device: torch.device) -> tuple[str, ...]:
    return PREFERENCE.get(device.type, ("triton", "reference"))


def available_backends(op: str, device: torch.device | str = "cpu") -> list[str]:
    """Backends that can run `op` ("rope_attention", "sinkhorn" or "alignment_loss") on `device`, preferred first."""
    if not isinstance(op, str) or op not in IMPLEMENTATIONS:
        raise ValueError(f"op must be one of {sorted(IMPLEMENTATIONS)}, got {op!r}")
    device = torch.device(device)
    first = preferred(device)
    ordered = first + tuple(name for name in BACKENDS if name not in first)
    return [name for name in ordered if unavailable_reason(op, name, device) is None]


def transforms_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode differentiation is running."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def check_backend(name: str, backend: str | None) -> None:
    if backend is not None and not (isinstance(backend, str) and backend in ("auto", *BACKENDS)):
        raise ValueError(f"{name} must be one of {BACKENDS} or 'auto', got {backend!r}")


def cannot_serve(op: str, backend: str, device: torch.device, call: Any = None) -> str | None:
    """Why `backend` cannot serve this call of `op` (without one: any call on `device`), or None.

    Under torch.func transforms (grad, vmap, jvp) and forward-mode differentiation only the reference serves: torch drops the
    tangents of registered operators that have no rules for them, without a word.
    """
    if backend != "reference" and transforms_active():
        return "its kernels have no rules for torch.func transforms and forward-mode differentiation"
    reason = unavailable_reason(op, backend, device)
    return implementation(op, backend).declines(call) if reason is None and call is not None else reason


def unmeasured(op: str, backend: str, call: Any) -> bool:
    """Whether the kernels of `backend` for this call have not run on hardware yet."""
    asks = getattr(implementation(op, backend), "unmeasured", None)
    return asks is not None and asks(call)


def choose_backend(op: str, backend: str | None, device: torch.device, call: Any = None) -> tuple[str, bool]:
    """The backend to use for one call of `op`, and whether another may take its place where its kernels fail.

    backend: the user's choice; None takes the environment variable COMP_KERNELS_BACKEND, else the device's preference.

    An automatic choice skips backends that decline, and takes one whose kernels for this call are `unmeasured` only where no
    other compiled one serves. A named one is used or refused: never silently replaced.
    """
    if torch.compiler.is_compiling():
        load(op)
    named_by = "backend"
    if backend is None:
        backend, named_by = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    check_backend(named_by, backend)
    if backend is None or backend == "auto":
        waiting = None
        for name in preferred(device):
            if waiting is not None and name not in LAUNCHED:
                break
            if cannot_serve(op, name, device, call) is not None:
                continue
            if waiting is None and call is not None and name in LAUNCHED and unmeasured(op, name, call):
                waiting = name
                continue
            return name, name in LAUNCHED
        return waiting or "reference", waiting is not None
    reason = cannot_serve(op, backend, device, call)
    if reason:
        raise RuntimeError(f"{named_by}={backend!r} cannot run {op} on {device}: {reason}")
    return backend, False


# --- kernels that fail -----------------------------------------------------------------------------------------------------


def function_of(op: str, function: str, backend: str, fallback: bool) -> Callable:
    """`function` ("forward" or "backward") of a backend, to be called with (call, ...).

    fallback: if the kernels of that backend cannot be compiled or launched, after one warning, the function of the next one
    that serves the call is run in its place, now and from now on.
    """
    if fallback:
        return functools.partial(_run, op, function, backend)
    return getattr(implementation(op, backend), function)


def _run(op: str, function: str, backend: str, call: Any, *arguments: Any) -> Any:
    while backend in LAUNCHED:
        if (op, backend, call.device) in _failures:  # in an earlier call
            backend = next_backend(op, call.device, call)
            continue
        try:
            return getattr(implementation(op, backend), function)(call, *arguments)
        except Exception as error:
            if not kernels_failed(error):
                raise
            backend = _replace_failed(op, backend, call, error)
    return getattr(implementation(op, backend), function)(call, *arguments)


def next_backend(op: str, device: torch.device, call: Any = None) -> str:
    """The preferred backend that serves the call and whose kernels have not failed on its device."""
    for name in preferred(device):
        if (op, name, device) not in _failures and cannot_serve(op, name, device, call) is None:
            return name
    return "reference"


def kernels_failed(error: Exception) -> bool:
    """Whether an exception says that kernels cannot be compiled or launched.

    Compilers and drivers raise whatever they like (TritonError, AssertionError without libcuda, RuntimeError, OSError), so it
    is told by what it is not: bad input (ValueError), want of memory, an error that torch itself reports of the device.
    """
    other = (ValueError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
    return not isinstance(error, other) and "out of memory" not in str(error)


def _replace_failed(op: str, backend: str, call: Any, error: Exception) -> str:
    """Remember the failure and say so, once; returns the backend to go on with."""
    reason = f"{type(error).__name__}: {error}"
    _failures[op, backend, call.device] = reason
    following = next_backend(op, call.device, call)
    warnings.warn(
        f"comp_kernels: the {backend} kernels of {op} could not be compiled or launched on {call.device}; in this process "
        f"{following} takes their place. backend={following!r} or {ENVIRONMENT_VARIABLE}={following} chooses it without this "
        f"warning, backend={backend!r} raises the whole error: {reason[:2000]}",
        RuntimeWarning,
        stacklevel=3,
    )
    return following


def failure(op: str, backend: str, device: torch.device) -> str | None:
    """What the kernels of `backend` failed with in this process, where an automatic choice has gone on to another."""
    return _failures.get((op, backend, device))
