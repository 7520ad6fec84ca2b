"""Counts what the CUDA kernels of rope_attention execute, on ptx_emulator, as Markdown: `python benchmarks/cuda_counts.py`.

The packed mix and the way of counting are those of the flash-attention counts in docs/kernels.md. Exact for the PTX; the
machine code is counted by `python -m ptx_emulator.sass FILE.cubin`. No GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]

from cuda_emulation import launches_on_emulator, missing  # noqa: E402

from comp_kernels import rope_attention  # noqa: E402
from comp_kernels.testing import AttentionCase, make_attention_inputs  # noqa: E402

LENGTHS = [256, 576, 1024, 729, 400, 1369]
PIPES = "tensor fp32 int mufu ldmatrix cvt mov async_copy control shuffle shared global barrier".split()


def count(head_dim: int, capability: int, backward: bool) -> list[tuple[str, dict]]:
    """(kernel, report) of every launch of one call on the mix: bf16, two heads, full-width tables shared by the heads."""
    inputs = make_attention_inputs(AttentionCase("mix", LENGTHS, head_dim=head_dim), torch.bfloat16)
    leaves = [x.requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v)]
    reports: list = []
    with launches_on_emulator(reports, capability=capability, check_race=False):
        out = rope_attention(*leaves, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="cuda", **inputs.kwargs)
        if backward:
            reports.clear()
            torch.autograd.grad(out, leaves, inputs.grad_out)
    return reports


def conflicts(report: dict) -> int:
    """Shared-memory wavefronts beyond the ideal."""
    return sum(x["wavefronts"] - x["ideal"] for x in report["shared"].values())


def table(head_dims: list[int], capability: int, backward: bool) -> str:
    columns = {head_dim: count(head_dim, capability, backward) for head_dim in head_dims}
    lines = ["| | " + " | ".join(f"D = {head_dim}" for head_dim in columns) + " |", "|---|" + "---|" * len(columns)]

    def row(label: str, value) -> None:
        lines.append(f"| {label} | " + " | ".join(f"{value(reports):,}" for reports in columns.values()) + " |")

    names = [name.removeprefix("rope_attention_").split("_bf16")[0] for name, _ in columns[head_dims[0]]]
    for i, name in enumerate(names):
        row(f"warp instructions, {name}", lambda reports, i=i: reports[i][1]["warp_instructions"])
    row("warp instructions, all", lambda reports: sum(report["warp_instructions"] for _, report in reports))
    for pipe in PIPES:
        row(pipe, lambda reports, pipe=pipe: sum(report["by_class"].get(pipe, 0) for _, report in reports))
    row("tensor FLOPs executed", lambda reports: sum(report["tensor_flops"] for _, report in reports))
    row("unique load sectors (32 B)", lambda reports: sum(report["global"]["unique_load_sectors"] for _, report in reports))
    row("unique store sectors", lambda reports: sum(report["global"]["unique_store_sectors"] for _, report in reports))
    row("bank conflicts (wavefronts)", lambda reports: sum(conflicts(report) for _, report in reports))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72, 128])
    parser.add_argument("--capability", type=int, default=80, choices=(80, 90), help="of the device that is pretended")
    parser.add_argument("--backward", action="store_true")
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    print(table(arguments.head_dims, arguments.capability, arguments.backward))
