"""One command for a machine with a GPU: is rope_attention correct there, how fast is it, how much memory does it take.

    python -m benchmarks.gpu_report [--out report] [--seconds 540]
    python -m benchmarks.gpu_report --dry-run      # the same path on the CPU with tiny cases, in seconds; its times say nothing

Writes report/report.md (a table per workload, errors beside times) and report/speed.png, and prints the table. Peers are timed
where they are installed: flash-attn (2 with its rotary kernel, 3 with compiled rotary), torch's varlen_attn, flex_attention,
xformers, nested jagged tensors and one fused attention call per image, all with compiled rotary. Times are medians of
triton.testing.do_bench (L2 flushed); in one workload all candidates run in turn, twice, and the better median counts. FLOPs are
4 D times the sum of squared lengths, three and a half times that with the backward, with the true head dim; the rotation is not
counted. Memory is the peak above the inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import comp_kernels as ck
from benchmarks import attention_peers
from comp_kernels.testing import ATTENTION_CASES, AttentionInputs, check_rope_attention, cumulative, grid_positions


@dataclass(frozen=True)
class Workload:
    """Packed images of one model."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int

    def flops(self, backward: bool) -> float:
        return 4 * self.head_dim * self.heads * sum(n * n for n in self.lengths) * (3.5 if backward else 1.0)


WORKLOADS = (
    Workload("ViT-B/16 224 px", (197,) * 64, 12, 64),
    Workload("SigLIP So400m 384 px", (729,) * 16, 16, 72),
    Workload("SigLIP NaFlex, mixed", (256, 576, 1024, 729, 400, 1369, 900, 2304), 16, 72),
    Workload("DINOv3-L 512 px", (1029,) * 16, 16, 64),
    Workload("Qwen2.5-VL windows", (64,) * 256, 16, 80),
    Workload("Qwen3-VL 1344 px", (7056, 7056), 16, 72),
    Workload("head dim 128", (1024,) * 12, 16, 128),
)
TINY_WORKLOADS = (Workload("equal lengths", (16, 16), 2, 16), Workload("mixed", (9, 25, 4), 2, 24))  # of the dry run
TINY_CASES = ("layout_half_hwhw", "cross")  # of comp_kernels.testing.ATTENTION_CASES, for the dry run


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor  # [T, D / 2] float32
    sin: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    prepared: dict = field(default_factory=dict)  # peer -> what it builds once per packing: a mask, a list of lengths

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def once(self, peer: str, build: Callable):
        """build(), called for the first use of this packing and not timed, as a model would share it between its layers."""
        if peer not in self.prepared:
            self.prepared[peer] = build()
        return self.prepared[peer]


def make_inputs(workload: Workload, device: str, dtype: torch.dtype) -> Inputs:
    tokens = sum(workload.lengths)
    q, k, v = torch.randn(3, tokens, workload.heads, workload.head_dim, device=device, dtype=dtype)
    freqs = ck.axial_freqs(workload.head_dim)[:, : workload.head_dim // 2]
    cos, sin = ck.rope_tables(grid_positions(list(workload.lengths))[:, 1:], freqs)
    bounds = cumulative(list(workload.lengths)).to(device)
    return Inputs(q, k, v, cos.to(device), sin.to(device), bounds, workload.lengths)


# --- candidates --------------------------------------------------------------------------------------------------------------


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What models do before they call an attention kernel: rotate in float32, round back. cos, sin [T, D / 2]."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def own_backends(device: str) -> list[str]:
    """Backends to report on: the kernels of a GPU; on the CPU, for the dry run, its own and the definition."""
    wanted = ("triton", "cuda") if device == "cuda" else ("cpu", "reference")
    return [backend for backend in ck.available_backends("rope_attention", device) if backend in wanted]


def rotated(x: Inputs, rotate: Callable) -> tuple[Tensor, Tensor]:
    return rotate(x.q, x.cos, x.sin), rotate(x.k, x.cos, x.sin)


def ours(backend: str) -> Callable:
    def attend(x: Inputs) -> Tensor:
        return ck.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens, backend=backend)

    return attend


def flash_attn() -> Callable:
    from flash_attn import flash_attn_varlen_func
    from flash_attn.layers.rotary import apply_rotary_emb

    def attend(x: Inputs) -> Tensor:
        # Its tables count positions within a sequence, so packed 2D tables go in as one long sequence. They stay float32, as
        # in the models; flash-attn releases that want them in the dtype of q say so, and that is then a note in the report.
        q, k = (apply_rotary_emb(t[None], x.cos, x.sin)[0] for t in (x.q, x.k))
        return flash_attn_varlen_func(q, k, x.v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest)

    return attend


def flash_attn_3() -> Callable:
    from flash_attn_interface import flash_attn_varlen_func

    rotate = torch.compile(rotate_half, dynamic=True)

    def attend(x: Inputs) -> Tensor:
        out = flash_attn_varlen_func(*rotated(x, rotate), x.v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest)
        return out[0] if isinstance(out, tuple) else out  # early releases return the lse as well

    return attend


def torch_varlen() -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    rotate = torch.compile(rotate_half, dynamic=True)

    def attend(x: Inputs) -> Tensor:
        return varlen_attn(*rotated(x, rotate), x.v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest)

    return attend


def flex() -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rotate, attention = torch.compile(rotate_half, dynamic=True), torch.compile(flex_attention)

    def block_mask(x: Inputs):
        tokens = x.q.shape[0]
        sequence = torch.bucketize(torch.arange(tokens, device=x.q.device), x.cu_seqlens[1:], right=True)
        return create_block_mask(lambda b, h, i, j: sequence[i] == sequence[j], None, None, tokens, tokens, x.q.device)

    def attend(x: Inputs) -> Tensor:
        mask = x.once("flex", lambda: block_mask(x))
        heads_first = (t.transpose(0, 1)[None] for t in (*rotated(x, rotate), x.v))
        return attention(*heads_first, block_mask=mask)[0].transpose(0, 1)

    return attend


def xformers() -> Callable:
    from xformers.ops import fmha

    rotate = torch.compile(rotate_half, dynamic=True)

    def attend(x: Inputs) -> Tensor:
        mask = x.once("xformers", lambda: fmha.BlockDiagonalMask.from_seqlens(list(x.lengths)))
        q, k, v = (t[None] for t in (*rotated(x, rotate), x.v))
        return fmha.memory_efficient_attention(q, k, v, attn_bias=mask)[0]

    return attend


def of_the_cpu_suite(peer: Callable) -> Callable:
    """A peer of benchmarks/attention_peers.py, which take tables of full width."""

    def attend(x: Inputs) -> Tensor:
        def prepare() -> Callable:
            cos, sin = (torch.cat((table, table), dim=-1) for table in (x.cos, x.sin))
            return peer(x, AttentionInputs(x.q, x.k, x.v, cos, sin, x.cu_seqlens))

        return x.once(peer.__name__, prepare)(x.q, x.k, x.v)

    return attend


PEERS: dict[str, tuple[str, Callable]] = {  # name -> (module that must be there, what returns attend(x))
    "flash-attn": ("flash_attn", flash_attn),
    "flash-attn 3": ("flash_attn_interface", flash_attn_3),
    "torch varlen": ("torch", torch_varlen),
    "flex": ("torch", flex),
    "xformers": ("xformers", xformers),
    "nested jagged": ("torch", lambda: of_the_cpu_suite(attention_peers.nested_jagged)),
    "SDPA per image": ("torch", lambda: of_the_cpu_suite(attention_peers.sdpa_loop)),
}


def available_candidates(device: str) -> tuple[dict[str, Callable], list[str]]:
    """(what can be timed by name, why the others cannot)."""
    candidates = {f"ours ({backend})": ours(backend) for backend in own_backends(device)}
    missing = []
    for name, (module, build) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            missing.append(f"{name}: {module} is not installed")
            continue
        try:
            candidates[name] = build()
        except ImportError as error:
            missing.append(f"{name}: {error}")
    return candidates, missing


# --- measurements ------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    workload: Workload
    candidate: str
    error: float  # largest, against the definition in float32
    forward: float  # milliseconds
    both: float  # forward and backward
    memory: float | None  # MiB above the inputs, forward and backward


def with_backward(attend: Callable, x: Inputs, cotangent: Tensor) -> Callable:
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    return lambda: torch.autograd.grad(attend(x), leaves, cotangent)


def peak_memory(function: Callable, device: str) -> float | None:
    """MiB that a call takes at its peak above what was there; the CPU does not tell."""
    if device != "cuda":
        function()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    workload: Workload, candidates: dict[str, Callable], timer: Callable, device: str
) -> tuple[list[Result], list[str]]:
    """Time all candidates on one workload, in turn, twice; (results, failures in words)."""
    x = make_inputs(workload, device, torch.bfloat16)
    cotangent = torch.randn_like(x.q)
    exact = ck.reference.rope_attention(x.q.float(), x.k.float(), x.v.float(), x.cos, x.sin, x.cu_seqlens)
    results, failures = {}, []
    for name, attend in candidates.items():
        try:
            with torch.no_grad():
                error = (attend(x).float() - exact).abs().max().item()
            memory = peak_memory(with_backward(attend, x, cotangent), device)
        except Exception as error:  # a peer that cannot serve this workload is a line in the report
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
            failures.append(f"{workload.name}, {name}: {reason}")
            continue
        results[name] = Result(workload, name, error, float("inf"), float("inf"), memory)
    del exact
    for _ in range(2):
        for name, result in results.items():
            with torch.no_grad():
                result.forward = min(result.forward, timer(lambda name=name: candidates[name](x)))
            result.both = min(result.both, timer(with_backward(candidates[name], x, cotangent)))
    return list(results.values()), failures


def check_correctness(device: str, deadline: float, names: tuple[str, ...] = ()) -> list[str]:
    """One line per backend: the error budget over the shared cases (all, or those named), forward and all gradients."""
    lines = []
    # Logits of 1e4 from rounded q and k say nothing about a kernel: one rounding of an input moves them by ten.
    cases = {name: ATTENTION_CASES[name] for name in names or ATTENTION_CASES if name != "logits_of_1e4"}
    for backend in own_backends(device):
        passed, failed = 0, []
        for name, case in cases.items():
            if time.monotonic() > deadline:
                failed.append("(out of time)")
                break
            try:
                check_rope_attention(case, torch.float16, backend, device)
                passed += 1
            except (AssertionError, RuntimeError) as error:
                failed.append(f"{name}: {str(error).splitlines()[0]}")
        lines.append(f"{backend}: {passed} of {len(cases)} cases within the budget" + "".join(f"; {f}" for f in failed))
    return lines


# --- the report --------------------------------------------------------------------------------------------------------------


def to_markdown(results: list[Result], notes: list[str], machine: str) -> str:
    lines = [f"# rope_attention on {machine}", ""]
    lines += [
        "| workload | candidate | forward ms | TFLOPS | forward + backward ms | TFLOPS | peak MiB | max error |",
        "|---" * 8 + "|",
    ]
    for r in results:
        memory = "-" if r.memory is None else f"{r.memory:.0f}"
        flops = [r.workload.flops(backward) for backward in (False, True)]
        lines.append(
            f"| {r.workload.name} | {r.candidate} | {r.forward:.3f} | {flops[0] / r.forward / 1e9:.3g} "
            f"| {r.both:.3f} | {flops[1] / r.both / 1e9:.3g} | {memory} | {r.error:.1e} |"
        )
    return "\n".join([*lines, "", "Notes", "", *(f"- {note}" for note in notes), ""])


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(r.candidate for r in results))
    workloads = list(dict.fromkeys(r.workload for r in results))
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 8), layout="constrained")
    for axis, attribute in zip(axes, ("forward", "both")):
        for index, name in enumerate(names):
            times = {r.workload: getattr(r, attribute) for r in results if r.candidate == name}
            heights = [w.flops(attribute == "both") / times[w] / 1e9 if w in times else 0 for w in workloads]
            positions = [i + index * 0.8 / len(names) for i in range(len(workloads))]
            axis.bar(positions, heights, width=0.8 / len(names), label=name)
        axis.set_xticks(range(len(workloads)), [workload.name for workload in workloads], fontsize=8)
        axis.set_ylabel("TFLOPS, " + ("forward" if attribute == "forward" else "forward + backward"))
    axes[0].legend()
    figure.savefig(path)
    pyplot.close(figure)


def time_once(function: Callable) -> float:
    """Milliseconds of one call: the clock of the dry run."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def report(
    device: str, workloads: tuple[Workload, ...], cases: tuple[str, ...], timer: Callable, seconds: float, out: Path
) -> str:
    """Check, measure, write `out`/report.md and speed.png; returns the text."""
    deadline = time.monotonic() + seconds
    torch.manual_seed(0)
    candidates, notes = available_candidates(device)
    notes += check_correctness(device, deadline - seconds / 2, cases)
    results: list[Result] = []
    for workload in workloads:
        if time.monotonic() > deadline:
            notes.append(f"{workload.name}: not measured, out of time")
            continue
        measured, failures = measure(workload, candidates, timer, device)
        results += measured
        notes += failures
    machine = torch.cuda.get_device_name() if device == "cuda" else "the CPU (a dry run: its times say nothing)"
    text = to_markdown(results, notes, f"{machine}, torch {torch.__version__}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text)
    plot(results, out / "speed.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("report"))
    parser.add_argument("--seconds", type=float, default=540.0, help="stop measuring after this long")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU, nothing compiled")
    arguments = parser.parse_args()
    if arguments.dry_run:
        with torch.compiler.set_stance("force_eager"):
            print(report("cpu", TINY_WORKLOADS, TINY_CASES, time_once, arguments.seconds, arguments.out))
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "gpu_report measures on a GPU and torch sees none; --dry-run goes through it on the CPU, and "
            "benchmarks.compile_report needs no GPU"
        )
    from triton.testing import do_bench

    print(report("cuda", WORKLOADS, (), lambda f: do_bench(f, return_mode="median"), arguments.seconds, arguments.out))


if __name__ == "__main__":
    main()
