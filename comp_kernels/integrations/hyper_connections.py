"""The projection of manifold-constrained hyper-connections (mHC, arXiv 2512.24880) by `sinkhorn`, as in other libraries.

Megatron-LM and Liger-Kernel project the mixing matrix of every token and layer onto the doubly stochastic matrices by the same
iteration: rows first, `eps` added to the first softmax and to every later sum; `order` and `eps` of `comp_kernels.sinkhorn`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .._backends import check_backend
from ..ops.sinkhorn import sinkhorn
from ._patching import Foreign


def sinkhorn_knopp(input_logits: Tensor, num_iterations: int, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """Megatron-LM's `native_sinkhorn` and `fused_sinkhorn` (core/transformer/hyper_connection.py): same arguments and numbers.

    Args:
        input_logits:  [..., n, n], n up to 32 for the kernels of this package; float32, float64, bfloat16 or float16.
        num_iterations:  iterations, at least 1.
        eps:  added to the first softmax and to every later sum.
        backend:  as of `comp_kernels.sinkhorn`.

    Returns:
        [..., n, n] in the dtype of the logits, computed in float32 (Megatron-LM computes in their dtype). Its gradient is that
        of the iterations as run, from one kernel; nothing is kept between the passes but the logits and the result.
    """
    plan = sinkhorn(
        input_logits,
        epsilon=1.0,
        num_iters=num_iterations,
        order="rows_cols",
        eps=eps,
        gradient="unrolled",
        backend=backend,
    )
    return plan.to(input_logits.dtype)


def liger_mhc_coeffs(
    x: Tensor,
    phi: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    *,
    allow_fp32: bool = False,
    tmax: int = 20,
    rms_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 2.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Liger-Kernel's `liger_mhc_coeffs` (transformers/functional.py): same arguments, same numbers, on any device and for any
    number of streams. RMS normalisation and products are PyTorch's, in float32; the projection is `sinkhorn`.

    Args:
        x:  [..., n, C] streams.
        phi:  [n C, n² + 2 n] projection to the logits.
        b:  [n² + 2 n], bias of the logits.
        alpha_pre:  scale of the logits of h_pre, one number.
        alpha_post:  of h_post.
        alpha_res:  of h_res.
        allow_fp32:  taken for the signature: float32 streams need no permission here.
        tmax:  `num_iters` of `comp_kernels.sinkhorn`.
        rms_eps:  of the normalisation.
        pre_eps:  is added to h_pre.
        sinkhorn_eps:  `eps` of `comp_kernels.sinkhorn`.
        post_mult:  factor of h_post.
        backend:  as of `comp_kernels.sinkhorn`.

    Returns:
        (h_pre [..., n], h_post [..., n], h_res [..., n, n]) in float32.
    """
    streams, channels = x.shape[-2:]
    if phi.shape != (streams * channels, streams * (streams + 2)) or b.shape != phi.shape[1:]:
        raise ValueError(
            f"phi and b must be {(streams * channels, streams * (streams + 2))} and {(streams * (streams + 2),)} for x "
            f"{tuple(x.shape)}, got {tuple(phi.shape)} and {tuple(b.shape)}"
        )
    flat = x.flatten(-2).float()
    # float32 whatever autocast says, which a device without values does not know.
    autocast = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        mix = (flat @ phi.float()) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    parts = (streams, streams, streams * streams)
    logits = (
        part * alpha + bias
        for part, alpha, bias in zip(mix.split(parts, -1), (alpha_pre, alpha_post, alpha_res), b.float().split(parts))
    )
    pre, post, res = logits
    h_res = sinkhorn_knopp(res.unflatten(-1, (streams, streams)), tmax, sinkhorn_eps, backend=backend)
    return pre.sigmoid() + pre_eps, post.sigmoid() * post_mult, h_res


def patch_megatron(model: nn.Module, *, backend: str | None = None) -> list[str]:
    """Let every HyperConnectionModule of a Megatron-LM model project by `sinkhorn_knopp`; names of the modules. ValueError if
    there is none, or if this version of Megatron-LM arranges them differently.

    Weights, state_dict and results stay. Call `unpatch_megatron` to undo it.
    """
    check_backend("backend", backend)
    modules = _hyper_connections(model)
    if not modules:
        raise ValueError(f"model: {type(model).__name__} has no HyperConnectionModule")
    for name, module in modules.items():
        if not callable(getattr(module, "_sinkhorn_op", None)):
            raise ValueError(
                f"{name}: this version of Megatron-LM arranges HyperConnectionModule differently, it has no _sinkhorn_op"
            )
    for module in modules.values():
        original = getattr(module._sinkhorn_op, "original", module._sinkhorn_op)
        module._sinkhorn_op = _Projection(original, backend)
    return list(modules)


def unpatch_megatron(model: nn.Module) -> list[str]:
    """Undo `patch_megatron`; names of the modules that changed back."""
    patched = {
        name: m for name, m in _hyper_connections(model).items() if isinstance(getattr(m, "_sinkhorn_op", None), _Projection)
    }
    for module in patched.values():
        module._sinkhorn_op = module._sinkhorn_op.original
    return list(patched)


class _Projection:
    """`sinkhorn_knopp` in the place of a module's own function, which it remembers; pickled and copied with the module."""

    def __init__(self, original, backend: str | None) -> None:
        self.original, self.backend = original, backend

    def __call__(self, input_logits: Tensor, num_iterations: int, eps: float = 1e-6) -> Tensor:
        return sinkhorn_knopp(input_logits, num_iterations, eps, backend=self.backend)


def _hyper_connections(model: nn.Module) -> dict[str, Foreign]:
    """Modules of Megatron-LM's class, by name, whether subclassed or not."""
    names = {"HyperConnectionModule"}
    return {name: m for name, m in model.named_modules() if names & {kind.__name__ for kind in type(m).__mro__}}
