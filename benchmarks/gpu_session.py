"""The truth about a GPU in minutes: is everything right there, how fast is it, what do its kernels take.

    python -m benchmarks.gpu_session --out session [--minutes 10] [--parts checks,attention] [--baseline OTHER.so]
    python -m benchmarks.gpu_session --out session --dry-run    # the same path on the CPU, tiny cases: its times say nothing

Every part runs in a process of its own with its own time limit, the most important first; one that fails or hangs does not stop
the next. Results are written as they come, one JSON object per line, to OUT/results.jsonl, so a killed run loses nothing.

    checks      rope_attention against float64 in every 16-bit dtype: the shared cases, longer ones at every head size that has
                kernels of its own, equal bits from run to run
    attention   the workloads of gpu_report, ours eager and as a CUDA graph, forward and with the backward; "ours, short": with
                the kernels for short sequences, which are off by default until they have been measured. --baseline: another
                build of the CUDA library, timed in turn with this one
    kernels     device time of every kernel of those workloads, by torch's profiler
    host        Python and C cost of one call of every operator and backend, without waiting for the device (host_cost)
    sinkhorn    three shapes beside a copy of the same matrix, and the projection of hyper-connections
    alignment   two shapes in four precisions beside the plain reference and Liger, with peak memory, and as a CUDA graph
    peers       what gpu_report times: other libraries with a compiled rotation

Times are medians of CUDA events in microseconds, candidates in turn, the L2 cache overwritten before each call.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import comp_kernels as ck
from benchmarks import gpu_report, host_cost
from benchmarks.alignment_peers import liger
from comp_kernels import _native
from comp_kernels.testing import ATTENTION_CASES, AttentionCase, check_median_error, check_rope_attention

SECONDS = {"checks": 120, "attention": 120, "kernels": 60, "host": 60, "sinkhorn": 60, "alignment": 90, "peers": 240}
TINY = {"sinkhorn": ((4, 33),), "hyper_connections": (5, 4, 4), "alignment": ((5, 40, 16),)}
HYPER_CONNECTIONS_SHAPE = (65536, 4, 4)
SINKHORN_SHAPES = ((64, 151936), (2048, 4096), (64, 128, 4096))
ALIGNMENT_SHAPES = ((256, 151936, 896), (2048, 49152, 576))  # n, V, D
ALIGNMENT_PRECISIONS = {  # torch.set_float32_matmul_precision, dtype of features, of prototypes
    "float32": ("highest", torch.float32, torch.float32),
    "tf32": ("high", torch.float32, torch.float32),
    "float32, bfloat16 prototypes": ("highest", torch.float32, torch.bfloat16),
    "bfloat16": ("highest", torch.bfloat16, torch.bfloat16),
}


def long_cases() -> list[AttentionCase]:
    """Sequences of several tiles at the head sizes that have kernels of their own on sm_90a."""
    cases = []
    for d in (64, 72, 80, 96, 128):
        cases += [
            AttentionCase(f"mixed_{d}", [1029, 197, 0, 64, 729], head_dim=d, slack=5),
            AttentionCase(f"edges_{d}", [256, 255, 257, 192, 193], head_dim=d, slack=5),
            AttentionCase(f"gqa_{d}", [300, 0, 500], heads=6, kv_heads=2, head_dim=d),
            AttentionCase(f"tables_{d}", [200, 177], heads=4, kv_heads=2, layout="per_head_interleaved", head_dim=d),
            AttentionCase(f"cross_{d}", [300, 0, 177, 400], lengths_k=[129, 555, 0, 700], head_dim=d, slack=7),
            AttentionCase(f"views_{d}", [130, 265], packed_qkv=True, heads=4, head_dim=d),
        ]
    return cases


class Session:
    """One part of the run: where its results go, and on what it runs."""

    def __init__(self, out: Path, part: str, tiny: bool, baseline: Path | None):
        self.out, self.part, self.tiny = out, part, tiny
        self.device = "cpu" if tiny else "cuda"
        self.workloads = gpu_report.TINY_WORKLOADS if tiny else gpu_report.WORKLOADS
        self.flush = torch.empty(0 if tiny else 128 << 20, dtype=torch.uint8, device=self.device)
        self.libraries: dict[str, ctypes.CDLL] = {}
        if not tiny and _native.cuda_unavailable_reason(torch.device("cuda")) is None:
            self.libraries["ours"] = self.libraries["ours, short"] = _native.cuda()
            if baseline is not None:
                self.libraries["baseline"] = ctypes.CDLL(str(baseline))

    def say(self, **row) -> None:
        text = json.dumps({"part": self.part, **row})
        with (self.out / "results.jsonl").open("a") as file:
            file.write(text + "\n")
        print(text, flush=True)

    def guarded(self, what: str, function: Callable):
        """function(), or a line that says what failed."""
        try:
            return function()
        except Exception as error:
            self.say(failed=what, error=f"{type(error).__name__}: {error}"[:300])

    def with_library(self, name: str, function: Callable) -> Callable:
        """`function` on that build of the CUDA library."""

        def call():
            library = self.libraries[name]
            _native._cuda = lambda: library
            if hasattr(library, "comp_kernels_cuda_rope_attention_set_short"):  # a baseline may be older
                library.comp_kernels_cuda_rope_attention_set_short(256 if name == "ours, short" else 0)
            return function()

        return call

    def times(self, functions: dict[str, Callable], rounds: int = 15) -> dict[str, float]:
        """Median microseconds of each, in turn."""
        if self.tiny:
            return {name: 1e3 * gpu_report.time_once(function) for name, function in functions.items()}
        events: dict[str, list] = {name: [] for name in functions}
        for function in functions.values():
            function()
        for _ in range(rounds):
            for name, function in functions.items():
                self.flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {n: round(1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs), 1) for n, pairs in events.items()}

    def graph(self, function: Callable) -> Callable:
        """Replay of `function` as a CUDA graph; on the CPU the function."""
        if self.tiny:
            return function
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graph.results = function()
        return graph.replay


def backend_of(session: Session) -> str:
    return "cpu" if session.tiny else "cuda"


def backends_of(op: str, session: Session) -> list[str]:
    """All that can run `op` there; on a GPU not the kernels of the CPU."""
    return [name for name in ck.available_backends(op, session.device) if name != "cpu" or session.tiny]


def calls(session: Session, workload: gpu_report.Workload) -> tuple[Callable, Callable]:
    """(forward, forward and backward) of ours on one workload."""
    x = gpu_report.make_inputs(workload, session.device, torch.bfloat16)
    attend = gpu_report.ours(backend_of(session))

    def forward():
        with torch.no_grad():
            return attend(x)

    leaves = gpu_report.make_inputs(workload, session.device, torch.bfloat16)
    return forward, gpu_report.with_backward(attend, leaves, torch.randn_like(x.q))


def checks(session: Session) -> None:
    cases = [*ATTENTION_CASES.values(), *long_cases()]
    if session.tiny:
        cases = [ATTENTION_CASES[name] for name in gpu_report.TINY_CASES]
    for dtype in (torch.bfloat16, torch.float16):
        passed = 0
        for case in cases:
            try:
                if case.name == "logits_of_1e4":  # decided by single roundings of q and k: one draw says nothing
                    check_median_error(case, dtype, backend_of(session), device=session.device)
                else:
                    check_rope_attention(case, dtype, backend_of(session), session.device)
                passed += 1
            except (AssertionError, RuntimeError) as error:
                session.say(case=case.name, dtype=str(dtype), error=str(error)[:300])
        session.say(dtype=str(dtype), passed=passed, of=len(cases))
    for workload in session.workloads:
        _, both = calls(session, workload)
        first = both()
        session.say(workload=workload.name, equal_bits=all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, both())))


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
    activity = torch.profiler.ProfilerActivity.CPU if session.tiny else torch.profiler.ProfilerActivity.CUDA
    for workload in session.workloads:
        _, both = calls(session, workload)
        both()
        with torch.profiler.profile(activities=[activity]) as profile:
            for _ in range(5):
                both()
            if not session.tiny:
                torch.cuda.synchronize()
        found = {event.key[:80]: round(event.self_device_time_total / 5, 1) for event in profile.key_averages()}
        session.say(workload=workload.name, us={name: us for name, us in found.items() if us > 0})


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


def sinkhorn(session: Session) -> None:
    for shape in TINY["sinkhorn"] if session.tiny else SINKHORN_SHAPES:
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
    shape = TINY["hyper_connections"] if session.tiny else HYPER_CONNECTIONS_SHAPE
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


def alignment(session: Session) -> None:
    before = torch.get_float32_matmul_precision()
    for shape in TINY["alignment"] if session.tiny else ALIGNMENT_SHAPES:
        for name, (setting, features, prototypes) in ALIGNMENT_PRECISIONS.items():
            torch.set_float32_matmul_precision(setting)
            what = (session, shape, name, features, prototypes)
            session.guarded(f"{shape} {name}", lambda what=what: alignment_times(*what))
            torch.set_float32_matmul_precision(before)


def alignment_times(session: Session, shape: tuple[int, int, int], precision: str, features, prototypes) -> None:
    """Ours, the plain version and Liger in one precision, forward and backward; ours as a CUDA graph too."""
    n, words, width = shape
    vision, text = (torch.randn(n, width, device=session.device, dtype=features) for _ in range(2))
    prototypes = torch.randn(words, width, device=session.device, dtype=prototypes)
    vision.requires_grad_()
    functions, memory = {}, {}
    for backend in backends_of("alignment_loss", session):

        def gradient(backend=backend):
            return torch.autograd.grad(ck.alignment_loss(vision, text, prototypes, backend=backend), vision)

        def measured(gradient=gradient):
            gradient()
            return gpu_report.peak_memory(gradient, session.device)

        functions[backend] = gradient
        memory[backend] = session.guarded(f"{precision} {backend} memory", measured)
        if backend != "reference":
            graph = session.guarded(f"{precision} {backend} graph", lambda gradient=gradient: session.graph(gradient))
            if graph is not None:
                functions[f"{backend}, graph"] = graph
    if not session.tiny and vision.dtype == prototypes.dtype:
        peer = session.guarded(f"{precision} liger", lambda: liger(vision, text, prototypes, 0.05))
        if peer is not None and session.guarded(f"{precision} liger", peer) is not None:
            functions["liger, mode softmax"] = peer
    session.say(shape=shape, precision=precision, us=session.times(functions, 5), mib=memory)


def peers(session: Session) -> None:
    timer = gpu_report.time_once
    if not session.tiny:
        from triton.testing import do_bench

        def timer(function):
            return do_bench(function, return_mode="median")

    candidates, missing = gpu_report.available_candidates(session.device)
    session.say(missing=missing)
    for workload in session.workloads:
        results, failures = gpu_report.measure(workload, candidates, timer, session.device)
        for result in results:
            session.say(workload=workload.name, candidate=result.candidate, forward_ms=result.forward, both_ms=result.both,
                        mib=result.memory, error=result.error)  # fmt: skip
        for failure in failures:
            session.say(failed=failure)


PARTS = {"checks": checks, "attention": attention, "kernels": kernels, "host": host, "sinkhorn": sinkhorn,
         "alignment": alignment, "peers": peers}  # fmt: skip


def environment(tiny: bool) -> dict:
    """What every number has to stand beside."""
    rows = {"torch": torch.__version__, "device": "the CPU (a dry run: its times say nothing)"}
    if not tiny:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        rows["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        rows |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    try:
        import triton

        rows["triton"] = triton.__version__
    except ImportError:
        rows["triton"] = None
    here = Path(__file__).parent
    rows["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    return rows


def run_parts(arguments: argparse.Namespace, session: Session) -> int:
    """Every part in a process of its own; returns how many failed."""
    end, failed = time.monotonic() + 60 * arguments.minutes, 0
    for part in arguments.parts.split(","):
        left = end - time.monotonic()
        if left < 5:
            session.say(failed=part, error="out of time")
            failed += 1
            continue
        command = [sys.executable, "-m", "benchmarks.gpu_session", "--out", str(arguments.out), "--part", part]
        command += ["--dry-run"] * arguments.dry_run
        command += ["--baseline", str(arguments.baseline)] if arguments.baseline else []
        start = time.monotonic()
        try:
            status = subprocess.run(command, timeout=min(left, SECONDS[part])).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        failed += status != 0
        session.say(finished=part, status=status, seconds=round(time.monotonic() - start, 1))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("session"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--baseline", type=Path, help="another libcomp_kernels_cuda.so, timed in turn with this one")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu_session measures on a GPU and torch sees none; --dry-run goes through it on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    session = Session(arguments.out, arguments.part or "session", arguments.dry_run, arguments.baseline)
    if arguments.part:
        with torch.compiler.set_stance("force_eager" if arguments.dry_run else "default"):
            PARTS[arguments.part](session)
        return
    session.say(**environment(arguments.dry_run))
    if failed := run_parts(arguments, session):
        raise SystemExit(f"{failed} part(s) failed, see {arguments.out / 'results.jsonl'}")


if __name__ == "__main__":
    main()
