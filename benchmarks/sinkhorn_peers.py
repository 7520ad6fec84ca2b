"""What a user could pick instead of sinkhorn: the loops of self-supervised learners, a compiled log-domain loop, POT.

Every peer is `function(scores [..., n, K]) -> P`, uniform marginals, a fixed number of iterations, no gradient. The loops of
DINOv2 and SwAV work on exp(scores / epsilon) without a shift: they overflow where scores / epsilon exceeds 88.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from comp_kernels import reference


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


def peers_of(scores: Tensor, epsilon: float, num_iters: int) -> dict:
    """Calls without arguments, by name; POT where it is installed."""
    peers = {
        "dinov2": lambda: dinov2_loop(scores, epsilon, num_iters),
        "swav": lambda: swav_loop(scores, epsilon, num_iters),
        "compiled log": lambda: compiled_log_loop()(scores, epsilon=epsilon, num_iters=num_iters),
    }
    try:
        import ot
    except ImportError:
        return peers
    rows, cols = scores.shape[-2:]
    if scores.dim() == 3:
        a, b = scores.new_ones(len(scores), rows), scores.new_full((len(scores), cols), rows / cols)
        peers["POT"] = lambda: ot.batch.bregman_log_projection_batch(scores / epsilon, a, b, max_iter=num_iters, tol=0)["T"]
    else:
        a, b = scores.new_ones(rows), scores.new_full((cols,), rows / cols)
        peers["POT"] = lambda: ot.bregman.sinkhorn_log(a, b, -scores, epsilon, numItermax=num_iters, stopThr=0, warn=False)
    return peers
