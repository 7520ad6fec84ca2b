"""The calls of host_cost with real launches: what a call costs the host, while nothing waits for the device."""

from __future__ import annotations

import time

import torch

from benchmarks import host_cost

from .session import Session


def host(session: Session) -> None:
    """The calls of host_cost, with real launches; nothing waits for the device."""
    warm_up, count = (1, 2) if session.tiny else (20, 200)
    for (op, backend, which), call in host_cost.cases(session.device, cpu=session.tiny).items():
        if session.tiny and backend != "cpu":  # Triton's interpreter has another cost
            continue

        def timed(call=call) -> float:
            for _ in range(warm_up):
                call()
            if not session.tiny:
                torch.cuda.synchronize()  # an empty queue: launches never wait for room in it
            start = time.perf_counter()
            for _ in range(count):
                call()
            return round((time.perf_counter() - start) / count * 1e6, 1)

        us = session.guarded(f"{op} {backend} {which}", timed)
        if us is not None:
            session.say(op=op, backend=backend, call=which, us=us)
