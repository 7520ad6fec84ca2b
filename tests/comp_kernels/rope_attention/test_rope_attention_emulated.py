"""The compiled Triton rope_attention, executed instruction by instruction on ptx_emulator for sm_80 and sm_90.

Every run checks each access against the bounds of its tensor, shared memory for races and for reads before writes, and
asynchronous copies for use before their wait. Bodies run in a process that compiles (tests/helpers/emulation.py).
"""

from unittest.mock import patch

import pytest
import torch
from emulation import emulating_launcher, needs_emulator, run_compiled

import comp_kernels as ck
from comp_kernels._triton import launches_go_to
from comp_kernels.ops.rope_attention import triton_configs
from comp_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    attention_with_gradients,
    check_rope_attention,
    make_attention_inputs,
)

pytestmark = [pytest.mark.emulated, needs_emulator]


def inline_length(tokens):
    """Within the context, keys are turned in the loop up to that length; the process goes on with other tests."""
    return patch.object(triton_configs, "INLINE_LENGTH", tokens)


def check_cases(cases, dtype, target, inline=0):
    with inline_length(inline), launches_go_to(emulating_launcher(target=target), f"sm_{target}"):
        for case in cases:
            check_rope_attention(case, dtype, "triton")


# Few shapes, many cases: each head dim, layout and group size is compiled once.
HALF_PRECISION = [
    AttentionCase("awkward_72", [1, 0, 63, 65, 127], head_dim=72),  # two chunks, partner in the other one
    AttentionCase("slack_72", [30, 137], head_dim=72, slack=13),
]
OTHERS = [
    ATTENTION_CASES["layout_per_head_interleaved"],
    ATTENTION_CASES["cross"],
]


@pytest.mark.parametrize("target", (80, 90))
def test_forward_and_backward(target):
    run_compiled(check_cases, HALF_PRECISION, torch.bfloat16, target)


def test_other_layouts_and_cross_attention():
    run_compiled(check_cases, OTHERS, torch.float16, 80)


@pytest.mark.parametrize("target", (80, 90))
def test_float32(target):
    """Three TF32 products per product: within the budget of float32. At 72 channels three chunks, the last half empty."""
    run_compiled(check_cases, [AttentionCase("awkward_72", [1, 0, 63, 65], head_dim=72, slack=13)], torch.float32, target)


def test_rotation_in_the_loop():
    run_compiled(check_cases, [ATTENTION_CASES["layout_partial"]], torch.bfloat16, 80, inline=64)


@inline_length(0)
def gradients_under_schedules(seeds):
    """One backward pass per random warp schedule, with the gradients of the tables left to the kernels' epilogues."""
    inputs = make_attention_inputs(ATTENTION_CASES["cross"], torch.float16)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    results = []
    for seed in seeds:
        with launches_go_to(emulating_launcher(seed=seed, quantum=7, check_uninit_reg=True), "sm_80"):
            out = ck.rope_attention(*leaves, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="triton", **inputs.kwargs)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)])
    exact = attention_with_gradients(inputs, lambda *a, **k: ck.reference.rope_attention(*a, return_lse=True, **k),
                                     torch.float64, lse_gradient=False)  # fmt: skip
    for name, value in zip(("out", "dq", "dk", "dv"), results[0]):
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-3, atol=2e-2)
    return [[x.detach().numpy() for x in result] for result in results]


def test_bit_equal_under_any_warp_schedule():
    first, *others = run_compiled(gradients_under_schedules, (1, 2, 3))
    for other in others:
        assert all((a == b).all() for a, b in zip(first, other))


@inline_length(0)
def forward_reports(target, head_dim):
    reports = []
    inputs = make_attention_inputs(
        AttentionCase("long", [257, 384], head_dim=head_dim, layout="half_hwhw_halfwidth"), torch.bfloat16
    )
    with launches_go_to(emulating_launcher(reports, target), f"sm_{target}"):
        ck.rope_attention(
            inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="triton", **inputs.kwargs
        )
    return [
        (
            name,
            report["tensor_flops"],
            report["global"],
            {k: (v["wavefronts"], v["ideal"]) for k, v in report["shared"].items()},
        )
        for name, report in reports
    ]


@pytest.mark.parametrize("target", (80, 90))
def test_traffic_and_tensor_work(target):
    """Compulsory bytes plus the workspace of rotated keys, nothing else; no bank conflicts; channels exact to 16."""
    tokens, heads, head_dim, sector = 257 + 384, 2, 72, 32
    reports = run_compiled(forward_reports, target, head_dim)
    row, padded = tokens * heads * head_dim * 2, tokens * heads * 80 * 2
    tables = 2 * tokens * head_dim // 2 * 4
    compulsory = {
        "rotate_kernel": row + padded + tables,
        "attention_forward_kernel": 3 * row + padded + tables + tokens * heads * 8,
    }
    for name, _, traffic, shared in reports:
        moved = (traffic["unique_load_sectors"] + traffic["unique_store_sectors"]) * sector
        assert moved <= 1.1 * compulsory[name], name
        assert all(wavefronts <= 1.02 * ideal for wavefronts, ideal in shared.values()), (name, shared)
    block_m, block_n, *_ = triton_configs.table_config("forward", f"sm_{target}", head_dim, torch.bfloat16)
    scores = sum(-(-n // block_m) * block_m * -(-n // block_n) * block_n for n in (257, 384))
    assert sum(flops for _, flops, _, _ in reports) == 4 * scores * heads * 80
