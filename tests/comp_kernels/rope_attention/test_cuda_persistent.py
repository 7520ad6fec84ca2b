"""The persistent forward of sm_90a, which is off by default: results of several tiles per block, in any order of the list."""

import pytest
import torch
from cuda_emulation import launches_on_emulator, needs_cuda_emulation

from comp_kernels import reference, rope_attention
from comp_kernels.testing import AttentionCase, assert_within_budget, make_attention_inputs, plain_rope_attention

pytestmark = [pytest.mark.emulated, needs_cuda_emulation]

# Tiles of 192 queries (128 at 128 channels): full ones, some that leave warpgroups without queries, empty sequences, slack.
CASES = [
    (AttentionCase("mixed", [300, 1, 0, 70], head_dim=64, heads=2, slack=5), torch.bfloat16, 2),
    (AttentionCase("mixed", [200, 33], head_dim=72, heads=2), torch.bfloat16, 1),
    (AttentionCase("cross", [70, 40, 9], lengths_k=[0, 260, 130], head_dim=72, heads=2, kv_heads=1, slack=3), torch.float16, 2),
    (AttentionCase("tables", [210], head_dim=80, heads=2, layout="per_head_interleaved"), torch.bfloat16, 3),
    (AttentionCase("plain", [100, 230], head_dim=96, heads=1, layout=None), torch.bfloat16, 2),
    (AttentionCase("mixed", [140, 0, 150], head_dim=128, heads=1), torch.bfloat16, 2),
]


@pytest.mark.parametrize(("case", "dtype", "blocks"), CASES, ids=[f"{case.name}_{case.head_dim}" for case, _, _ in CASES])
def test_matches_the_reference(case, dtype, blocks):
    inputs = make_attention_inputs(case, dtype)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin)
    bounds = dict(cu_seqlens=inputs.cu_seqlens, **inputs.kwargs)
    reports = []
    with launches_on_emulator(reports, capability=90, persistent=blocks, check_wgmma_regs=True, check_proxy=True):
        actual = rope_attention(*tensors, **bounds, return_lse=True, backend="cuda")
    widened = {name: x.double() if name in ("cos_k", "sin_k") else x for name, x in bounds.items()}
    exact = reference.rope_attention(*(x if x is None else x.double() for x in tensors), **widened, return_lse=True)
    for name, found, truth, peer in zip(("out", "lse"), actual, exact, plain_rope_attention(*tensors, **bounds)):
        assert_within_budget(f"{case.name} {name}", found, truth, peer, factor=2.5)  # one draw, see check_rope_attention
    assert [name.split("_")[2] for name, _ in reports] == ["prepare", "persistent"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_does_not_depend_on_the_schedule(seed, in_place):
    """Warps that run ahead of others by tiles, down to single steps: bit for bit what one block per item makes."""
    inputs = make_attention_inputs(AttentionCase("seeds", [250, 30, 200], head_dim=64, heads=2), torch.bfloat16)

    def run(blocks: int, **options):
        with launches_on_emulator(capability=90, persistent=blocks, check_wgmma_regs=True, check_proxy=True, **options):
            return rope_attention(inputs.q, inputs.k, inputs.v, cu_seqlens=inputs.cu_seqlens, backend="cuda")

    assert torch.equal(run(1, seed=seed, quantum=20 + 30 * seed, values_in_place=in_place), run(100))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_warpgroups_without_queries_run_ahead(seed):
    """Tiles of 192 and of 128 queries in turn: the third warpgroup, idle in every other one, is in the next tile while others
    still pass turns round. Passing one then would be one too many: they waited for each other for ever."""
    inputs = make_attention_inputs(AttentionCase("ahead", [320, 320], head_dim=64, heads=1), torch.bfloat16)

    def run(blocks: int, **options):
        with launches_on_emulator(capability=90, persistent=blocks, **options):
            return rope_attention(inputs.q, inputs.k, inputs.v, cu_seqlens=inputs.cu_seqlens, backend="cuda")

    assert torch.equal(run(1, seed=seed, quantum=20 + 37 * seed), run(0))


def test_same_bits_as_one_block_per_tile():
    """The steps are those of the other kernel, and so is what they round."""
    inputs = make_attention_inputs(AttentionCase("bits", [250, 30], head_dim=72, heads=2), torch.bfloat16)
    results = []
    for blocks in (0, 2):
        with launches_on_emulator(capability=90, persistent=blocks):
            results.append(
                rope_attention(
                    inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="cuda", **inputs.kwargs
                )
            )
    assert torch.equal(*results)
