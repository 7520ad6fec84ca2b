"""What a user could pick instead of sinkhorn: the loops of self-supervised learners, a compiled log-domain loop, POT, OTT-JAX,
geomloss.

Every peer is a call without arguments, for uniform marginals, a fixed number of iterations and no gradient, with what it
computes in words and as a definition in float64; `Peer.check` holds the first against the second before anything is timed.
The loops of DINOv2 and SwAV work on exp(scores / epsilon) without a shift: they overflow where scores / epsilon exceeds 88.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comp_kernels import reference

SAME = "the same plan: columns and then rows are scaled, so rows end exact"
TOLERANCE = 1e-3  # of the plan's largest entry; another order of half steps, or another number, is hundreds of times as far off


@dataclass(frozen=True)
class Peer:
    """One way to compute a plan of scores [n, K] or [B, n, K]."""

    call: Callable[[], Any]
    """The plan, a torch tensor or a JAX array, in the precision of the scores."""
    define: Callable[[], Tensor]
    """The plan that `call` stands for, in float64; of a batch the first."""
    computes: str
    """In words, for the table."""

    def check(self) -> float:
        """The largest error of the call's plan (of the first item of a batch), in units of its largest entry. ValueError above
        TOLERANCE: what would be timed is not what the table says."""
        plan = self.call()
        plan = plan if isinstance(plan, Tensor) else torch.from_numpy(np.array(plan))
        expected = self.define()
        error = ((_first(plan).double() - expected).abs().max() / expected.max()).item()
        if not error <= TOLERANCE:
            raise ValueError(f"the plan is {error:.1e} of its largest entry away from: {self.computes}")
        return error


def _first(plan: Tensor) -> Tensor:
    return plan if plan.dim() == 2 else plan[0]


def dinov2_loop(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """The arithmetic of DINOv2's sinkhorn_knopp_teacher, with a batch dimension: prototypes by samples, out of place sums."""
    q = (scores / epsilon).exp().mT
    prototypes, samples = q.shape[-2:]
    q /= q.sum((-2, -1), keepdim=True)
    for _ in range(num_iters):
        q /= q.sum(-1, keepdim=True)
        q /= prototypes
        q /= q.sum(-2, keepdim=True)
        q /= samples
    q *= samples
    return q.mT


def swav_loop(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """The arithmetic of SwAV's first version: both marginals as vectors, scaled by broadcasting."""
    q = (scores / epsilon).exp().mT
    q /= q.sum((-2, -1), keepdim=True)
    rows = torch.full((q.shape[-2], 1), 1 / q.shape[-2])
    columns = torch.full((1, q.shape[-1]), 1 / q.shape[-1])
    for _ in range(num_iters):
        q *= rows / q.sum(-1, keepdim=True)
        q *= columns / q.sum(-2, keepdim=True)
    return (q / q.sum(-2, keepdim=True)).mT


@functools.cache
def compiled_log_loop():
    return torch.compile(reference.sinkhorn, dynamic=False)


def pot_solver(scores: Tensor, epsilon: float, num_iters: int) -> Callable[[], Tensor] | None:
    """POT's log-domain solver, the batch version for batches; None where POT is not installed.

    The batch version scales rows first and columns last, the plain one the other way round: it is given the transposed problem.
    """
    try:
        import ot
    except ImportError:
        return None
    rows, cols = scores.shape[-2:]
    if scores.dim() == 2:
        a, b = scores.new_ones(rows), scores.new_full((cols,), rows / cols)
        return lambda: ot.bregman.sinkhorn_log(a, b, -scores, epsilon, numItermax=num_iters, stopThr=0, warn=False)
    a, b = scores.new_ones(len(scores), rows), scores.new_full((len(scores), cols), rows / cols)
    turned = scores.mT.contiguous()
    return lambda: ot.batch.bregman_log_projection_batch(turned / epsilon, b, a, max_iter=num_iters, tol=0)["T"].mT


def ott_solver(scores: Tensor, epsilon: float, num_iters: int) -> Callable[[], Any] | None:
    """OTT-JAX, compiled, mapped over a batch; None where it is not installed.

    It iterates in blocks of `inner_iterations`, 10 unless told otherwise, so of 3 iterations it would run 10 or none.
    """
    try:
        import jax
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
    except ImportError:
        return None
    rows, cols = scores.shape[-2:]
    solver = Sinkhorn(threshold=-1.0, inner_iterations=num_iters, min_iterations=num_iters, max_iterations=num_iters)
    a, b = jax.numpy.ones(rows), jax.numpy.full(cols, rows / cols)

    def solve(x):
        return solver(LinearProblem(Geometry(cost_matrix=-x, epsilon=epsilon), a=a, b=b)).matrix

    compiled = jax.jit(jax.vmap(solve) if scores.dim() == 3 else solve)
    given = jax.numpy.asarray(scores.cpu().numpy())  # on JAX's own device from here on
    return lambda: compiled(given).block_until_ready()


def geomloss_solver(scores: Tensor, epsilon: float, num_iters: int) -> Callable[[], Tensor] | None:
    """geomloss (0.3 on) on a matrix of costs; None where it is not installed."""
    try:
        from geomloss import ot as geomloss
    except ImportError:
        return None
    rows, cols = scores.shape[-2:]
    a, b = scores.new_ones(scores.shape[:-1]), scores.new_full((*scores.shape[:-2], cols), rows / cols)
    solve = geomloss.solve_batch if scores.dim() == 3 else geomloss.solve
    return lambda: solve(-scores, reg=epsilon, a=a, b=b, max_iter=num_iters).plan


def mhc_loop(logits: Tensor, num_iters: int, eps: float = 1e-6) -> Tensor:
    """The projection of hyper-connections in plain PyTorch: Megatron-LM's native_sinkhorn, and Liger-Kernel's reference."""
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(num_iters - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


@functools.cache
def compiled_mhc_loop():
    """What Megatron-LM runs."""
    return torch.compile(mhc_loop, dynamic=False)


def small_peers_of(scores: Tensor, num_iters: int) -> dict:
    """Functions of the scores, differentiable, by name: for many small matrices."""
    return {
        "compiled": lambda scores: compiled_mhc_loop()(scores, num_iters),
        "eager": lambda scores: mhc_loop(scores, num_iters),
        "log domain": lambda scores: reference.sinkhorn(scores, epsilon=1.0, num_iters=num_iters, order="rows_cols"),
    }


def peers_of(scores: Tensor, epsilon: float, num_iters: int) -> dict[str, Peer]:
    """By name; POT, OTT-JAX and geomloss where they are installed."""
    settings = (epsilon, num_iters)

    def same() -> Tensor:
        return reference.sinkhorn(_first(scores).double(), epsilon=epsilon, num_iters=num_iters)

    def annealed() -> Tensor:
        return _first(geomloss_solver(scores.double(), *settings)())

    found = {
        "dinov2": (lambda: dinov2_loop(scores, *settings), same, SAME),
        "swav": (lambda: swav_loop(scores, *settings), same, SAME),
        "compiled log": (lambda: compiled_log_loop()(scores, epsilon=epsilon, num_iters=num_iters), same, SAME),
        "POT": (pot_solver(scores, *settings), same, f"{SAME}; and once the sums of the plan, for a tolerance of 0"),
        "OTT-JAX": (ott_solver(scores, *settings), same, SAME),
        "geomloss": (
            geomloss_solver(scores, *settings),
            annealed,
            "another plan, a peer in time only: within the iterations the temperature falls to epsilon from the largest cost "
            "of the whole batch, each averages old and new potentials, and neither marginal is met",
        ),
    }
    return {name: Peer(*parts) for name, parts in found.items() if parts[0] is not None}
