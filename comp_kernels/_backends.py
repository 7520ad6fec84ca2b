"""Which backend runs an operator: `backend=None` picks by device, a named backend is used or refused with the reason.

A backend is a module of the operator's folder (`cpu`, `triton`, `cuda`) next to the plain `reference`. It is listed in
`IMPLEMENTATIONS` once it exists, and says itself, through `unavailable_reason(device)`, whether it can run here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "COMP_KERNELS_BACKEND"

# operator -> backend -> module of this package with `unavailable_reason(device: torch.device) -> str | None` (None: it can run)
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "rope_attention": {
        "cpu": ".ops.rope_attention.cpu",
        "triton": ".ops.rope_attention.triton_backend",
        "cuda": ".ops.rope_attention.cuda",
    },
    "sinkhorn": {
        "cpu": ".ops.sinkhorn.cpu",
        "triton": ".ops.sinkhorn.triton_backend",
        "cuda": ".ops.sinkhorn.cuda",
    },
    "alignment_loss": {
        "cpu": ".ops.alignment_loss.cpu",
        "triton": ".ops.alignment_loss.triton_backend",
    },
}

_loaded: dict = {}  # module path -> module

# Order of preference per device type; the first that can run is taken, the reference always can.
PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),  # as measured on an H200, docs/kernels.md
}


def implementation(op: str, backend: str):
    """The module that implements `op` on `backend`; imported on first use, so that `import comp_kernels` stays light."""
    path = IMPLEMENTATIONS[op][backend]
    if path not in _loaded:
        _loaded[path] = importlib.import_module(path, __package__)
    return _loaded[path]


def unavailable_reason(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run `op` on `device`, in words for the user; None when it can."""
    if backend == "reference":
        return None
    if backend not in IMPLEMENTATIONS[op]:
        return f"{op} has no {backend} implementation"
    return implementation(op, backend).unavailable_reason(device)


# torch.compile takes the answer as a constant; asking also loads the module, which tracing itself could not do. This is what
# torch.compiler.assume_constant_result sets, without importing the whole compiler for it (half of torch's own import time).
unavailable_reason._dynamo_marked_constant = True


def available_backends(op: str, device: torch.device | str = "cpu") -> list[str]:
    """Backends that can run `op` ("rope_attention", "sinkhorn" or "alignment_loss") on `device`, preferred first."""
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"op must be one of {sorted(IMPLEMENTATIONS)}, got {op!r}")
    device = torch.device(device)
    preferred = PREFERENCE.get(device.type, ("triton", "reference"))
    ordered = preferred + tuple(name for name in BACKENDS if name not in preferred)
    return [name for name in ordered if unavailable_reason(op, name, device) is None]


def transforms_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode differentiation is running."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def check_backend(name: str, backend: str | None) -> None:
    if backend not in (None, "auto", *BACKENDS):
        raise ValueError(f"{name} must be one of {BACKENDS} or 'auto', got {backend!r}")


def choose_backend(
    op: str, backend: str | None, device: torch.device, declines: Callable[[str], str | None] | None = None
) -> str:
    """The backend to use for one call of `op`.

    backend:  the user's choice; None takes the environment variable COMP_KERNELS_BACKEND, else the device's preference.
    declines: for one backend name, why it cannot serve *this* call (a dtype, a head size), or None.

    An automatic choice skips backends that decline. A named one is used or refused: never silently replaced. Under torch.func
    transforms (grad, vmap, jvp) and forward-mode differentiation only the reference serves: torch drops the tangents of
    registered operators that have no rules for them, without a word.
    """

    def cannot(name: str) -> str | None:
        if transforms_active() and name != "reference":
            return "its kernels have no rules for torch.func transforms and forward-mode differentiation"
        reason = unavailable_reason(op, name, device)
        return declines(name) if reason is None and declines is not None else reason

    named_by = "backend"
    if backend is None:
        backend, named_by = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if backend in (None, "auto"):
        for name in PREFERENCE.get(device.type, ("triton", "reference")):
            if not cannot(name):
                return name
        return "reference"
    check_backend(named_by, backend)
    reason = cannot(backend)
    if reason:
        raise RuntimeError(f"{named_by}={backend!r} cannot run {op} on {device}: {reason}")
    return backend
