"""sinkhorn beside a copy of the same matrix, and the projection of hyper-connections."""

from __future__ import annotations

from collections.abc import Callable

import torch

import comp_kernels as ck

from .session import Session, backends_of

SHAPES = ((64, 151936), (2048, 4096), (64, 128, 4096))
HYPER_CONNECTIONS_SHAPE = (65536, 4, 4)
TINY_SHAPES = ((4, 33),)
TINY_HYPER_CONNECTIONS_SHAPE = (5, 4, 4)


def sinkhorn(session: Session) -> None:
    for shape in TINY_SHAPES if session.tiny else SHAPES:
        scores = torch.randn(shape, device=session.device) * 0.1
        target = torch.empty_like(scores)
        functions: dict[str, Callable] = {"copy": lambda x=scores, y=target: y.copy_(x)}
        for backend in backends_of("sinkhorn", session):

            def solve(backend=backend, scores=scores):
                return ck.sinkhorn(scores, epsilon=0.05, backend=backend)

            functions[backend] = solve
            graph = session.guarded(f"{shape} {backend} graph", lambda solve=solve: session.graph(solve))
            if graph is not None:
                functions[f"{backend}, graph"] = graph
        session.guarded(f"{shape}", lambda f=functions, shape=shape: session.say(shape=shape, us=session.times(f)))
    hyper_connections(session)


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
