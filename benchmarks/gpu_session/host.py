"""The calls of host_cost with real launches: what a call costs the host, while nothing waits for the device."""

from __future__ import annotations

import time

from benchmarks import host_cost

from .session import Session


def host(session: Session) -> None:
    warm_up, count = (1, 2) if session.tiny else (20, 160)
    for (op, backend, which), case in host_cost.cases(session.device, cpu=session.tiny).items():
        if session.tiny and backend != "cpu":  # Triton's interpreter has another cost
            continue

        def timed(case=case) -> float:
            for _ in range(warm_up):
                case.run()
            session.wait()  # an empty queue: launches never wait for room in it
            start = time.perf_counter()
            runs = max(count // case.calls, 1)
            for _ in range(runs):
                case.run()
            return round((time.perf_counter() - start) / (runs * case.calls) * 1e6, 1)

        us = session.guarded(f"{op} {backend} {which}", timed)
        if us is not None:
            session.say(op=op, backend=backend, call=which, us=us)
