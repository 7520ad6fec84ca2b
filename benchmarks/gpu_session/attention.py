"""Time of rope_attention on the workloads, eager and as a CUDA graph, forward and with the backward; kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .session import Session, backend_of
from .workloads import Workload, make_inputs, ours, with_backward, without_gradient


def calls(session: Session, workload: Workload) -> tuple[Callable, Callable]:
    """(forward, forward and backward) of ours on one workload."""
    x = make_inputs(workload, session.device, torch.bfloat16)
    attend = ours(backend_of(session))
    leaves = make_inputs(workload, session.device, torch.bfloat16)
    return without_gradient(attend, x), with_backward(attend, leaves, torch.randn_like(x.q))


def attention(session: Session) -> None:
    for workload in session.workloads:
        functions: dict[str, Callable] = {}
        for name in session.libraries or {"ours": None}:
            forward, both = calls(session, workload)
            if session.libraries:
                forward, both = session.with_library(name, forward), session.with_library(name, both)
            functions |= {f"{name} forward": forward, f"{name} both": both}
            functions |= {f"{name} forward, graph": session.graph(forward), f"{name} both, graph": session.graph(both)}
        times = session.times(functions)
        teraflops = {name: round(workload.flops("both" in name) / us / 1e6) for name, us in times.items()}
        session.say(workload=workload.name, us=times, teraflops=teraflops)


def kernels(session: Session) -> None:
    for workload in session.workloads:
        _, both = calls(session, workload)
        session.say(workload=workload.name, us=session.kernels(both))
