"""The CUDA kernels of sinkhorn, executed on ptx_emulator: results on the shared cases, tolerance, traffic and conflicts."""

import pytest
import torch
from cuda_emulation import launches_on_emulator, needs_cuda_emulation

import comp_kernels as ck
from comp_kernels import reference
from comp_kernels.ops.sinkhorn import cuda
from comp_kernels.testing import SINKHORN_CASES, assert_within_budget, make_sinkhorn_inputs

pytestmark = [pytest.mark.emulated, needs_cuda_emulation]


CASES = [(name, torch.float32) for name in SINKHORN_CASES]
CASES += [("odd", torch.bfloat16), ("marginals_per_item", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_matches_the_definition(name, dtype):
    case = SINKHORN_CASES[name]
    scores, marginals = make_sinkhorn_inputs(case, dtype)
    settings = dict(epsilon=case.epsilon, num_iters=case.num_iters, return_potentials=True)
    with launches_on_emulator():
        actual = ck.sinkhorn(scores, **marginals, **settings, backend="cuda")
    exact = reference.sinkhorn(scores.double(), **{key: x.double() for key, x in marginals.items()}, **settings)
    peer = reference.sinkhorn(scores, **marginals, **settings)
    for label, found, truth, plain in zip(("plan", "u", "v"), actual, exact, peer):
        assert_within_budget(f"{name} {label}", found, truth, plain)


def test_rows_that_are_split_over_blocks_and_read_through_a_view():
    scores = torch.randn(200, 80)[:, 8:72].to(torch.bfloat16)
    with launches_on_emulator():
        plan = ck.sinkhorn(scores, epsilon=0.3, backend="cuda")
    exact, peer = (reference.sinkhorn(x, epsilon=0.3) for x in (scores.double(), scores))
    assert_within_budget("plan", plan, exact, peer)


def test_tolerance_stops_the_iterations():
    scores = torch.randn(2, 20, 33)
    settings = dict(epsilon=1.0, num_iters=8, tol=1e-2)
    with launches_on_emulator():
        plan = ck.sinkhorn(scores, **settings, backend="cuda")
    torch.testing.assert_close(plan, reference.sinkhorn(scores, **settings), rtol=1e-4, atol=1e-6)


def test_float64_is_refused():
    with launches_on_emulator(), pytest.raises(RuntimeError, match="float64"):
        ck.sinkhorn(torch.randn(4, 5, dtype=torch.float64), epsilon=1.0, backend="cuda")


def test_traffic_and_bank_conflicts():
    """One iteration reads the scores twice, and once more from cache for the plan: no sector in vain."""
    rows, cols = 128, 1024
    scores = torch.randn(rows, cols).to(torch.bfloat16)
    reports = []
    with launches_on_emulator(reports):
        ck.sinkhorn(scores, epsilon=0.5, num_iters=1, backend="cuda")
    columns, _, row_pass = (report for _, report in reports)
    assert [name for name, _ in reports] == ["sinkhorn_columns_bf16_8", "sinkhorn_merge", "sinkhorn_rows_bf16_8"]
    bytes_of_scores = rows * cols * 2
    small = 4 * (rows + cols)  # potentials and marginals
    assert bytes_of_scores <= columns["global"]["unique_load_sectors"] * 32 <= bytes_of_scores + small
    assert columns["global"]["load"]["efficiency"] > 0.85  # what is not 16 bytes wide: one potential per row and warp
    assert row_pass["global"]["unique_load_sectors"] * 32 <= bytes_of_scores + small
    assert row_pass["global"]["store"]["efficiency"] > 0.95
    assert row_pass["global"]["unique_store_sectors"] * 32 <= rows * cols * 4 + 2 * 32 * rows
    for access in ("load", "store"):
        assert columns["shared"][access]["wavefronts"] == columns["shared"][access]["ideal"]


def test_refuses_other_devices():
    assert "CUDA device" in cuda.unavailable_reason(torch.device("cpu"))
