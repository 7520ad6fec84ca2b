"""The sm_90a forwards that read values where they are, off by default: the bits of those that read a copy, whatever lies
beside."""

import re

import cuda_emulation
import pytest
import torch
from cuda_emulation import launches_on_emulator, needs_cuda_emulation

from comp_kernels import rope_attention
from comp_kernels.testing import AttentionCase, make_attention_inputs

pytestmark = [pytest.mark.emulated, needs_cuda_emulation]

CASES = [
    (AttentionCase("tiles", [300, 1, 0, 129], head_dim=64, heads=2, slack=5), torch.bfloat16),
    (AttentionCase("grouped", [70, 40, 9], lengths_k=[0, 260, 130], head_dim=72, heads=4, kv_heads=2, slack=3), torch.float16),
    (AttentionCase("packed", [100, 33], head_dim=72, heads=2, packed_qkv=True), torch.bfloat16),
    (AttentionCase("tables", [210], head_dim=80, heads=2, layout="per_head_interleaved"), torch.float16),
    (AttentionCase("plain", [7, 230, 0], head_dim=96, heads=1, layout=None), torch.bfloat16),
    (AttentionCase("empty", [0, 0], head_dim=64, heads=1, slack=40), torch.bfloat16),
    (AttentionCase("tiles", [140, 0, 150], head_dim=128, heads=1), torch.float16),
]


def attend(inputs, in_place: bool = True, reports: list | None = None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse)"""
    checks = dict(check_wgmma_regs=True, check_proxy=True, check_uninit_reg=in_place)
    with launches_on_emulator(reports, capability=90, values_in_place=in_place, **(checks | options)), torch.no_grad():
        tensors = (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens)
        return rope_attention(*tensors, backend="cuda", return_lse=True, **inputs.kwargs)


def many_keys(head_dim: int):
    """One tile of queries, and keys for more steps than the ring has slots."""
    return make_attention_inputs(AttentionCase("keys", [20], lengths_k=[930], head_dim=head_dim, heads=1), torch.bfloat16)


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=[f"{case.name}_{case.head_dim}" for case, _ in CASES])
def test_same_bits_as_from_a_copy(case, dtype):
    inputs, reports = make_attention_inputs(case, dtype), []
    for found, expected in zip(attend(inputs, reports=reports), attend(inputs, in_place=False)):
        assert torch.equal(found, expected)
    assert [name.split("_")[2] for name, _ in reports] == ["images", "forward"]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=[f"{case.name}_{case.head_dim}" for case, _ in CASES])
def test_same_bits_in_the_grid_that_stays(case, dtype):
    inputs, reports = make_attention_inputs(case, dtype), []
    for found, expected in zip(attend(inputs, reports=reports, persistent=2), attend(inputs, in_place=False)):
        assert torch.equal(found, expected)
    assert [name.split("_")[2] for name, _ in reports] == ["prepare", "persistent"]


@pytest.mark.parametrize("nothing", [torch.nan, torch.inf])
def test_what_lies_behind_a_sequence_is_not_read(nothing):
    """Weights of keys that do not exist are zero, and zero times NaN would be NaN."""
    inputs = make_attention_inputs(AttentionCase("behind", [100, 140, 30], head_dim=72, heads=2, slack=30), torch.bfloat16)
    expected = attend(inputs)[0][:240]
    inputs.v[240:] = nothing
    assert torch.equal(attend(inputs)[0][:240], expected)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [64, 128])  # five slots in the ring, and two
def test_does_not_depend_on_the_schedule(head_dim, seed):
    inputs = many_keys(head_dim)
    for found, expected in zip(attend(inputs, seed=seed, quantum=20 + 30 * seed), attend(inputs, in_place=False)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        (r"(cp\.async\.wait_group \d+;.*?)fence\.proxy\.async[^;]*;", "proxy"),
        (r"()cp\.async\.wait_group \d+;", "async-copy"),
    ],
    ids=["fence", "wait"],
)
def test_the_emulator_misses_what_a_copy_needs(pattern, kind, monkeypatch):
    """The tests above would fail without the wait for a copy, or without the fence that lets wgmma see it."""
    whole = cuda_emulation.module

    def without(source):
        text, count = re.subn(pattern, r"\1", whole(source).text, flags=re.DOTALL)
        return whole(source) if count == 0 else cuda_emulation.import_emulator().load(text)

    monkeypatch.setattr(cuda_emulation, "module", without)
    with pytest.raises(cuda_emulation.import_emulator().KernelError) as error:
        attend(many_keys(64))
    assert error.value.kind == kind


def test_counts():
    """The pass before reads and writes one tensor less; the kernel copies without a bank conflict, nothing twice."""
    case = AttentionCase("counts", [256, 384], head_dim=64, heads=2)
    inputs, moved = make_attention_inputs(case, torch.bfloat16), {}
    for in_place in (False, True):
        reports = []
        attend(inputs, in_place=in_place, reports=reports)
        (_, images), (_, forward) = reports
        moved[in_place] = images["global"]["unique_load_sectors"], images["global"]["unique_store_sectors"]
        if in_place:
            assert forward["local_bytes"] == 0
            assert forward["shared"]["async_write"]["wavefronts"] == forward["shared"]["async_write"]["ideal"]
            tiles = sum((n + 191) // 192 * n for n in case.lengths)  # rows of values over all tiles of queries
            assert (
                forward["by_opcode"]["cp.async.cg.shared.global.L2::128B"] == tiles / 4 * case.heads
            )  # 8 rows x 4 of 8 chunks
    tensor = sum(case.lengths) * case.heads * case.head_dim * 2 // 32
    assert (moved[False][0] - moved[True][0], moved[False][1] - moved[True][1]) == pytest.approx((tensor, tensor), abs=8)
