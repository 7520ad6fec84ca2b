"""sinkhorn beside a copy of the same matrix and its peers, and the projection of hyper-connections."""

from __future__ import annotations

from collections.abc import Callable

import torch

import comp_kernels as ck

from ..sinkhorn_peers import dinov2_loop, ott_solver, pot_solver
from .session import Session, backends_of

EPSILON, NUM_ITERS = 0.05, 3
SHAPES = ((64, 151936), (2048, 4096), (64, 128, 4096))
HYPER_CONNECTIONS_SHAPE = (65536, 4, 4)
TINY_SHAPES = ((4, 33),)
TINY_HYPER_CONNECTIONS_SHAPE = (5, 4, 4)


def sinkhorn(session: Session) -> None:
    for shape in TINY_SHAPES if session.tiny else SHAPES:
        scores = torch.randn(shape, device=session.device) * 0.1
        target = torch.empty_like(scores)
        functions: dict[str, Callable] = {"copy": lambda x=scores, y=target: y.copy_(x)}
        backends = backends_of("sinkhorn", session)
        for backend in backends:
            functions |= solves(session, backend, backend, scores)
        for dtype in (torch.bfloat16, torch.float16):  # of the one that a user gets
            functions |= solves(session, f"{backends[0]}, {str(dtype).removeprefix('torch.')}", backends[0], scores.to(dtype))
        functions |= peers(session, scores)
        session.guarded(f"{shape}", lambda f=functions, shape=shape: session.say(shape=shape, us=session.times(f)))
    hyper_connections(session)


def solves(session: Session, name: str, backend: str, scores: torch.Tensor) -> dict[str, Callable]:
    """A call of ours, and the same as a CUDA graph."""

    def solve():
        return ck.sinkhorn(scores, epsilon=EPSILON, num_iters=NUM_ITERS, backend=backend)

    graph = session.guarded(f"{tuple(scores.shape)} {name} graph", lambda: session.graph(solve))
    return {name: solve} | ({} if graph is None else {f"{name}, graph": graph})


def peers(session: Session, scores: torch.Tensor) -> dict[str, Callable]:
    """DINOv2's loop, eager and compiled, POT and OTT-JAX where they are installed; those that run."""
    settings = (scores, EPSILON, NUM_ITERS)
    found = {"dinov2": lambda: dinov2_loop(*settings)}
    if not session.tiny:
        compiled = torch.compile(dinov2_loop, dynamic=False)
        found["dinov2, compiled"] = lambda: compiled(*settings)
    for name, solver in (("POT", pot_solver), ("OTT-JAX", ott_solver)):
        call = session.guarded(f"{tuple(scores.shape)} {name}", lambda solver=solver: solver(*settings))
        if call is not None:
            found[name] = call
    return {name: call for name, call in found.items() if runs(session, f"{tuple(scores.shape)} {name}", call)}


def runs(session: Session, what: str, call: Callable) -> bool:
    return session.guarded(what, lambda: call() is not None) is True


def hyper_connections(session: Session) -> None:
    """Many small matrices, 20 iterations, beside a copy of them: forward, and with the exact gradient."""
    shape = TINY_HYPER_CONNECTIONS_SHAPE if session.tiny else HYPER_CONNECTIONS_SHAPE
    logits, weights, target = (torch.randn(shape, device=session.device) for _ in range(3))
    leaf = logits.clone().requires_grad_()
    functions: dict[str, Callable] = {"copy": lambda: target.copy_(logits)}
    for backend in backends_of("sinkhorn", session):

        def project(logits, backend=backend):
            settings = dict(epsilon=1.0, num_iters=20, order="rows_cols", eps=1e-6, gradient="unrolled")
            return ck.sinkhorn(logits, backend=backend, **settings)

        functions[f"{backend} forward"] = lambda project=project: project(logits)
        functions[f"{backend} forward + backward"] = lambda project=project: torch.autograd.grad(project(leaf), leaf, weights)
        graph = session.guarded(f"{shape} {backend} graph", lambda project=project: session.graph(lambda: project(logits)))
        if graph is not None:
            functions[f"{backend} forward, graph"] = graph
    session.guarded(f"{shape}", lambda: session.say(shape=shape, us=session.times(functions)))
