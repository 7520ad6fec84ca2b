"""Counts what the GPU kernels of rope_attention execute, beside flash-attention's, as Markdown. No GPU is needed.

    python tests/helpers/emulated_counts.py [--backend triton|cuda] [--head-dims 64 72 128] [--target 80|90] [--backward]

Runs the compiled PTX on ptx_emulator: exact for the PTX; the compiler of machine code still changes moves and addresses
(benchmarks/compile_report.py reads that). bfloat16, one packed batch, tables shared by the heads. On the default mix, forward
on sm_80, flash-attention's counts were recorded and stand beside ours; elsewhere ours stand alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from emulation import emulating_launcher, emulator_missing

from comp_kernels import rope_attention
from comp_kernels._triton import launches_go_to
from comp_kernels.ops.rope_attention import triton_configs
from comp_kernels.testing import AttentionCase, make_attention_inputs

LENGTHS = [256, 576, 1024, 729, 400, 1369]
HEADS = 2
LAYOUT = "half_hwhw_halfwidth"  # the tables that flash-attention's rotary kernel takes
PIPES = "tensor fp32 int mufu ldmatrix cvt mov async_copy control shuffle shared global barrier".split()


class Counts(NamedTuple):
    warp_instructions: int
    tensor_flops: int
    sectors: int  # distinct 32-byte sectors read plus those written, per launch


# flash-attention 2.8.4 (commit 0251105a) on LENGTHS, HEADS, bfloat16, forward, sm_80, on the same emulator: its attention
# kernel, and its rotary kernel (half-width float32 tables) launched on q and on k, since it does not fuse the rotation.
FLASH_ATTENTION = {
    64: Counts(2_929_540, 2_231_369_728, 104_497 + 35_921),
    72: Counts(4_026_304, 3_290_431_488, 117_559 + 40_275),
    128: Counts(4_306_700, 4_387_241_984, 208_993 + 70_753),
}
FLASH_ROTARY = {
    64: Counts(828_400, 0, 208_992),
    72: Counts(1_264_400, 0, 235_116),
    128: Counts(1_238_240, 0, 417_984),
}


def on_emulator(backend: str, target: int, reports: list) -> AbstractContextManager:
    """Launches of `backend` run on the emulator as on an sm_{target} device; (kernel, report) of each goes to `reports`."""
    if backend == "triton":
        return launches_go_to(emulating_launcher(reports, target, check_race=False), f"sm_{target}")
    from cuda_emulation import launches_on_emulator

    return launches_on_emulator(reports, capability=target, check_race=False)


def missing(backend: str) -> str | None:
    """Why nothing can be counted here, in one line; None when it can."""
    if backend == "triton":
        return emulator_missing()
    from cuda_emulation import missing as cuda_missing

    return cuda_missing()


def count(backend: str, case: AttentionCase, target: int = 80, backward: bool = False) -> list[tuple[str, dict]]:
    """(kernel, report) of every launch of the forward or of the backward pass of one call."""
    inputs = make_attention_inputs(case, torch.bfloat16)
    leaves = [x.requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v)]
    reports: list = []
    with on_emulator(backend, target, reports):
        out = rope_attention(*leaves, inputs.cos, inputs.sin, inputs.cu_seqlens, backend=backend, **inputs.kwargs)
        if backward:
            reports.clear()
            torch.autograd.grad(out, leaves, inputs.grad_out)
    return reports


def sectors(report: dict) -> int:
    return report["global"]["unique_load_sectors"] + report["global"]["unique_store_sectors"]


def conflicts(report: dict) -> int:
    """Shared-memory wavefronts beyond the ideal."""
    return sum(x["wavefronts"] - x["ideal"] for x in report["shared"].values())


def total(reports: list[tuple[str, dict]]) -> Counts:
    values = (report for _, report in reports)
    return Counts(*map(sum, zip(*((r["warp_instructions"], r["tensor_flops"], sectors(r)) for r in values))))


def peer(head_dim: int) -> Counts | None:
    """flash-attention and its rotary kernel together, where they were recorded."""
    if head_dim not in FLASH_ATTENTION:
        return None
    return Counts(*map(sum, zip(FLASH_ATTENTION[head_dim], FLASH_ROTARY[head_dim])))


def table(columns: dict[int, list[tuple[str, dict]]], with_peer: bool) -> str:
    """Markdown: one column per head dim; `columns` holds what `count` returned."""
    lines = ["| | " + " | ".join(f"D = {head_dim}" for head_dim in columns) + " |", "|---|" + "---|" * len(columns)]

    def row(label: str, cell: Callable[[int], str]) -> None:
        lines.append(f"| {label} | " + " | ".join(map(cell, columns)) + " |")

    def sum_row(label: str, value: Callable[[dict], int]) -> None:
        row(label, lambda head_dim: f"{sum(value(report) for _, report in columns[head_dim]):,}")

    for i, (name, _) in enumerate(next(iter(columns.values()))):
        name = name.removeprefix("rope_attention_").split("_bf16")[0]
        row(f"warp instructions, {name}", lambda head_dim, i=i: f"{columns[head_dim][i][1]['warp_instructions']:,}")
    labels = zip(Counts._fields, ("warp instructions", "tensor FLOPs", "distinct 32-byte sectors, read + written"))
    for field, label in labels:
        row(f"**{label}, ours**", lambda d, field=field: f"{getattr(total(columns[d]), field):,}")
        if with_peer:
            row(f"{label}, flash-attention + rotary", lambda d, field=field: f"{getattr(peer(d), field):,}" if peer(d) else "-")
            row(
                f"**{label}, ours / theirs**",
                lambda d, field=field: f"{getattr(total(columns[d]), field) / getattr(peer(d), field):.2f}" if peer(d) else "-",
            )
    for pipe in PIPES:
        sum_row(pipe, lambda report, pipe=pipe: report["by_class"].get(pipe, 0))
    sum_row("sectors read", lambda report: report["global"]["unique_load_sectors"])
    sum_row("sectors written", lambda report: report["global"]["unique_store_sectors"])
    sum_row("bank conflicts (wavefronts)", conflicts)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton", choices=("triton", "cuda"))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72, 128])
    parser.add_argument("--target", type=int, default=80, choices=(80, 90), help="compute capability of the pretended device")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens per sequence")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--layout", default=LAYOUT, help="of comp_kernels.testing.LAYOUTS")
    parser.add_argument("--keys-in-loop", action="store_true", help="triton: rotate keys in every query tile, no workspace")
    arguments = parser.parse_args()
    if reason := missing(arguments.backend):
        raise SystemExit(f"nothing counted: {reason}")
    if arguments.keys_in_loop:
        triton_configs.INLINE_LENGTH = max(arguments.lengths)
    columns = {}
    for head_dim in arguments.head_dims:
        case = AttentionCase("mix", arguments.lengths, heads=arguments.heads, head_dim=head_dim, layout=arguments.layout)
        columns[head_dim] = count(arguments.backend, case, arguments.target, arguments.backward)
    recorded = (arguments.lengths, arguments.heads, arguments.target, arguments.backward) == (LENGTHS, HEADS, 80, False)
    print(table(columns, with_peer=recorded))


if __name__ == "__main__":
    main()
