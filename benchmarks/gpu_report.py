"""One command for a machine with a GPU: is rope_attention correct there, how fast is it, how much memory does it take.

    python -m benchmarks.gpu_report [--out report] [--seconds 540]

Writes report/report.md (a table per workload, errors beside times) and report/speed.png, and prints the table. Peers are timed
where they are installed: flash-attn with its rotary kernel, torch's varlen_attn with compiled rotary, flex_attention with
compiled rotary, xformers. Times are medians of triton.testing.do_bench (L2 flushed); in one workload all candidates run in
turn, twice, and the better median counts. FLOPs are 4 D times the sum of squared lengths, three and a half times that with the
backward, with the true head dim; the rotation is not counted. Memory is the peak above the inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import comp_kernels as ck
from comp_kernels.testing import ATTENTION_CASES, check_rope_attention, cumulative, grid_positions


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


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor
    longest: int


def make_inputs(workload: Workload, device: str, dtype: torch.dtype) -> Inputs:
    tokens = sum(workload.lengths)
    q, k, v = torch.randn(3, tokens, workload.heads, workload.head_dim, device=device, dtype=dtype)
    freqs = ck.axial_freqs(workload.head_dim)[:, : workload.head_dim // 2]
    cos, sin = ck.rope_tables(grid_positions(list(workload.lengths))[:, 1:], freqs)
    bounds = cumulative(list(workload.lengths)).to(device)
    return Inputs(q, k, v, cos.to(device), sin.to(device), bounds, max(workload.lengths))


# --- candidates --------------------------------------------------------------------------------------------------------------


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What models do before they call an attention kernel: rotate in float32, round back. cos, sin [T, D / 2]."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def ours(backend: str) -> Callable:
    def attend(x: Inputs) -> Tensor:
        return ck.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens, backend=backend)

    return attend


def flash_attn() -> Callable:
    from flash_attn import flash_attn_varlen_func
    from flash_attn.layers.rotary import apply_rotary_emb

    def attend(x: Inputs) -> Tensor:
        # Its tables count positions within a sequence, so packed 2D tables go in as one long sequence.
        q, k = (apply_rotary_emb(t[None], x.cos.to(t.dtype), x.sin.to(t.dtype))[0] for t in (x.q, x.k))
        return flash_attn_varlen_func(q, k, x.v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest)

    return attend


def torch_varlen() -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    rotate = torch.compile(rotate_half, dynamic=True)

    def attend(x: Inputs) -> Tensor:
        q, k = (rotate(t, x.cos, x.sin) for t in (x.q, x.k))
        return varlen_attn(q, k, x.v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest)

    return attend


def flex() -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rotate, compiled = torch.compile(rotate_half, dynamic=True), torch.compile(flex_attention)
    masks: dict[int, object] = {}

    def attend(x: Inputs) -> Tensor:
        tokens = x.q.shape[0]
        if id(x) not in masks:  # built once per packing and not timed, as a model would share it between its layers
            sequence = torch.bucketize(torch.arange(tokens, device=x.q.device), x.cu_seqlens[1:], right=True)
            masks[id(x)] = create_block_mask(
                lambda b, h, i, j: sequence[i] == sequence[j], None, None, tokens, tokens, x.q.device
            )
        q, k = (rotate(t, x.cos, x.sin) for t in (x.q, x.k))
        heads_first = (t.transpose(0, 1)[None] for t in (q, k, x.v))
        return compiled(*heads_first, block_mask=masks[id(x)])[0].transpose(0, 1)

    return attend


def xformers() -> Callable:
    from xformers.ops import fmha

    rotate = torch.compile(rotate_half, dynamic=True)

    def attend(x: Inputs) -> Tensor:
        lengths = x.cu_seqlens.diff().tolist()
        mask = fmha.BlockDiagonalMask.from_seqlens(lengths)
        q, k = (rotate(t, x.cos, x.sin)[None] for t in (x.q, x.k))
        return fmha.memory_efficient_attention(q, k, x.v[None], attn_bias=mask)[0]

    return attend


PEERS = {"flash-attn": ("flash_attn", flash_attn), "torch varlen": ("torch", torch_varlen), "flex": ("torch", flex),
         "xformers": ("xformers", xformers)}  # fmt: skip


def available_candidates(device: str) -> tuple[dict[str, Callable], list[str]]:
    """(what can be timed by name, why the others cannot)."""
    candidates = {
        f"ours ({backend})": ours(backend)
        for backend in ck.available_backends("rope_attention", device)
        if backend in ("triton", "cuda")
    }
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
    workload: str
    candidate: str
    error: float  # largest, against the definition in float32
    forward: float  # milliseconds
    both: float  # forward and backward
    memory: float  # MiB above the inputs, forward and backward


def with_backward(attend: Callable, x: Inputs, cotangent: Tensor) -> Callable:
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    return lambda: torch.autograd.grad(attend(x), leaves, cotangent)


def peak_memory(function: Callable) -> float:
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
            memory = peak_memory(with_backward(attend, x, cotangent))
        except Exception as error:  # a peer that cannot serve this workload is a line in the report
            failures.append(
                f"{workload.name}, {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        results[name] = Result(workload.name, name, error, float("inf"), float("inf"), memory)
    del exact
    for _ in range(2):
        for name, result in results.items():
            with torch.no_grad():
                result.forward = min(result.forward, timer(lambda name=name: candidates[name](x)))
            result.both = min(result.both, timer(with_backward(candidates[name], x, cotangent)))
    return list(results.values()), failures


def check_correctness(device: str, deadline: float) -> list[str]:
    """One line per backend: the error budget over the shared cases, forward and all gradients."""
    lines = []
    # Logits of 1e4 from rounded q and k say nothing about a kernel: one rounding of an input moves them by ten.
    cases = {name: case for name, case in ATTENTION_CASES.items() if name != "logits_of_1e4"}
    for backend in ck.available_backends("rope_attention", device):
        if backend not in ("triton", "cuda"):
            continue
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
    workloads = {workload.name: workload for workload in WORKLOADS}
    for r in results:
        flops = [workloads[r.workload].flops(backward) for backward in (False, True)]
        lines.append(
            f"| {r.workload} | {r.candidate} | {r.forward:.3f} | {flops[0] / r.forward / 1e9:.0f} "
            f"| {r.both:.3f} | {flops[1] / r.both / 1e9:.0f} | {r.memory:.0f} | {r.error:.1e} |"
        )
    return "\n".join([*lines, "", "Notes", "", *(f"- {note}" for note in notes), ""])


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(r.candidate for r in results))
    workloads = list(dict.fromkeys(r.workload for r in results))
    flops = {workload.name: workload for workload in WORKLOADS}
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 8), layout="constrained")
    for axis, attribute in zip(axes, ("forward", "both")):
        for index, name in enumerate(names):
            times = {r.workload: getattr(r, attribute) for r in results if r.candidate == name}
            heights = [flops[w].flops(attribute == "both") / times[w] / 1e9 if w in times else 0 for w in workloads]
            positions = [i + index * 0.8 / len(names) for i in range(len(workloads))]
            axis.bar(positions, heights, width=0.8 / len(names), label=name)
        axis.set_xticks(range(len(workloads)), workloads, fontsize=8)
        axis.set_ylabel("TFLOPS, " + ("forward" if attribute == "forward" else "forward + backward"))
    axes[0].legend()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("report"))
    parser.add_argument("--seconds", type=float, default=540.0, help="stop measuring after this long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_report measures on a GPU and torch sees none; benchmarks.compile_report needs no GPU")
    from triton.testing import do_bench

    deadline = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    candidates, notes = available_candidates("cuda")
    notes += check_correctness("cuda", deadline - arguments.seconds / 2)
    results: list[Result] = []
    for workload in WORKLOADS:
        if time.monotonic() > deadline:
            notes.append(f"{workload.name}: not measured, out of time")
            continue
        measured, failures = measure(workload, candidates, lambda f: do_bench(f, return_mode="median"), "cuda")
        results += measured
        notes += failures
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = to_markdown(results, notes, machine)
    (arguments.out / "report.md").write_text(text)
    plot(results, arguments.out / "speed.png")
    print(text)


if __name__ == "__main__":
    main()
