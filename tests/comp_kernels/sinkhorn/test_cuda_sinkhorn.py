"""The CUDA kernels of sinkhorn, executed on ptx_emulator: results on the shared cases, tolerance, traffic and conflicts."""

import collections

import cuda_emulation
import pytest
import torch
from cuda_emulation import launches_on_emulator, needs_cuda_emulation
from test_sinkhorn import assert_defaults_are_their_values

import comp_kernels as ck
from comp_kernels import reference
from comp_kernels.ops.sinkhorn import cuda
from comp_kernels.ops.sinkhorn.call import Call
from comp_kernels.ops.sinkhorn.native import SolveParams
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


@pytest.mark.parametrize("shape", ((2, 20, 72), (8200, 40)), ids=("one launch", "passes"))
@pytest.mark.parametrize("tol", (dict(), dict(tol=1e-2)), ids=("fixed", "tol"))
def test_default_marginals_are_their_values(shape, tol):
    with launches_on_emulator():
        assert_defaults_are_their_values(shape, "cuda", torch.bfloat16, num_iters=2, **tol)


FEW_BLOCKS, ALONE = (3, 60 * 1024, True), (1, 60 * 1024, True)


def solve(scores, device=cuda_emulation.SMALL, reports=None, seed=0, quantum=256, **settings):
    """(plan, u, v) on a device with so many multiprocessors, shared bytes per block, and cooperative launches or not."""
    with launches_on_emulator(reports, device=device, seed=seed, quantum=quantum):
        return ck.sinkhorn(scores, **settings, return_potentials=True, backend="cuda")


def check(scores, device=cuda_emulation.SMALL, **settings):
    actual = solve(scores, device, **settings)
    exact, peer = (reference.sinkhorn(x, **settings, return_potentials=True) for x in (scores.double(), scores))
    for label, *triple in zip(("plan", "u", "v"), actual, exact, peer):
        assert_within_budget(label, *triple)


SHAPES = {
    "tiles in shared memory, several per block": ((64, 1600), torch.float32, FEW_BLOCKS),
    "and rows that do not fit there": ((64, 1600), torch.float32, (3, 40 * 1024, True)),
    "more rows than threads hold at once": ((600, 48), torch.float32, FEW_BLOCKS),
    "rows merged in shares": ((2080, 64), torch.bfloat16, cuda_emulation.SMALL),
    "items one after the other, a team each": ((3, 64, 2048), torch.bfloat16, (8, 60 * 1024, True)),
    "a block per item": ((5, 40, 72), torch.float16, FEW_BLOCKS),
    "one multiprocessor": ((70, 200), torch.float32, ALONE),
    "columns that no access of 16 bytes divides": ((70, 331), torch.float16, FEW_BLOCKS),
}


@pytest.mark.parametrize("name", SHAPES)
def test_one_launch_and_the_bits_of_many(name):
    """All blocks in one launch under two random schedules, and a launch for every step: global memory holds no race that these
    would show, and nothing depends on what stays in shared memory."""
    shape, dtype, device = SHAPES[name]
    scores = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    check(scores, device, epsilon=0.1)
    reports, many = [], []
    found = [solve(scores, device, reports, seed, 7, epsilon=0.1) for seed in (1, 2)]
    assert [name.split("_")[1] for name, _ in reports] == ["resident"] * 2
    found.append(solve(scores, (*device[:2], False), many, epsilon=0.1))
    assert len(many) == (1 if name in ("a block per item", "one multiprocessor") else 4 * 3 + 1)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))


def test_sums_out_of_range_are_taken_again():
    """A row far below the others in every column, columns whose mass moves by more than 2^20 from one iteration to the next,
    and marginals that no sum of ordinary size comes near."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20, 400, generator=generator)
    scores[3] -= 1.5
    scores[:, 100:140] += torch.linspace(-1, 1, 20)[:, None]
    cols = torch.rand(400, generator=generator) + 0.01
    cols[7] = 1e-25
    rows = torch.full((20,), cols.sum().item() / 20)
    marginals = dict(row_marginals=rows, col_marginals=cols)
    settings = dict(epsilon=0.01, num_iters=4)
    actual = solve(scores, FEW_BLOCKS, seed=1, quantum=9, **marginals, **settings)
    doubles = {name: x.double() for name, x in marginals.items()}
    exact = reference.sinkhorn(scores.double(), **doubles, **settings, return_potentials=True)
    peer = reference.sinkhorn(scores, **marginals, **settings, return_potentials=True)
    for label, *triple in zip(("plan", "u", "v"), actual, exact, peer):
        assert_within_budget(label, *triple)
    reports = []
    many = solve(scores, (*FEW_BLOCKS[:2], False), reports, **marginals, **settings)
    assert all(torch.equal(x, y) for x, y in zip(actual, many))
    rescues = [report["shared"]["store"]["requests"] for _, report in reports[2::4]]
    assert len(rescues) == settings["num_iters"] and any(rescues)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("num_iters", (1, 2))
def test_entries_that_are_no_numbers(value, num_iters):
    """What becomes of them is what the definition makes of them, entry by entry."""
    scores = torch.rand(40, 256, generator=torch.Generator().manual_seed(0))
    scores[5, 100] = value
    actual = solve(scores, FEW_BLOCKS, epsilon=0.2, num_iters=num_iters)
    expected = reference.sinkhorn(scores, epsilon=0.2, num_iters=num_iters, return_potentials=True)
    for found, wanted in zip(actual, expected):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", ((40, 256), (2, 20, 64), (9, 20, 64)))
@pytest.mark.parametrize("cooperative", (True, False))
def test_tolerance_stops_the_iterations(shape, cooperative):
    """After as many as the definition does, on the device: by blocks that meet, or by launches that find a flag set."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    settings = dict(epsilon=0.3, tol=1e-3)
    reports = []
    actual = solve(scores, (8, 60 * 1024, cooperative), reports, num_iters=12, **settings)
    together = cooperative and (len(shape) == 2 or shape[0] <= 8)
    assert len(reports) == (1 if together else 4 * 12 + 1)
    expected = reference.sinkhorn(scores, num_iters=12, **settings, return_potentials=True)
    fewer = next(t for t in range(1, 12) if torch.equal(expected[0], reference.sinkhorn(scores, epsilon=0.3, num_iters=t)))
    assert 1 < fewer < 12
    for found, wanted, once_more in zip(actual, expected, solve(scores, epsilon=0.3, num_iters=fewer)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, once_more, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cooperative", (True, False))
def test_a_graph_serves_other_scores(cooperative):
    """What a CUDA graph would keep of a call, counters that are zeroed included, gives what a call gives: with tol, too."""
    scores, device, recording = torch.rand(40, 256), (4, 60 * 1024, cooperative), cuda_emulation.Recording()
    settings = dict(epsilon=0.2, num_iters=4, tol=1e-3)
    with launches_on_emulator(device=device, recording=recording):
        found = ck.sinkhorn(scores, **settings, return_potentials=True, backend="cuda")
    for seed in (1, 2):
        scores.uniform_(generator=torch.Generator().manual_seed(seed))
        recording.replay()
        assert all(torch.equal(x, y) for x, y in zip(found, solve(scores, device, **settings)))


def test_what_few_blocks_would_take_goes_in_passes():
    """More rows than the one launch has shared memory for; with tol too, whose steps are then the passes."""
    scores = torch.rand(8200, 40, generator=torch.Generator().manual_seed(0))
    check(scores, epsilon=0.3, num_iters=1)
    names: list = []
    solve(scores, reports=names, epsilon=0.3, num_iters=1)
    assert [name for name, _ in names] == ["sinkhorn_columns_fp32_4", "sinkhorn_merge", "sinkhorn_rows_fp32_4"]
    settings = dict(epsilon=0.5, num_iters=3, tol=1e-2)
    torch.testing.assert_close(solve(scores, **settings)[0], reference.sinkhorn(scores, **settings), rtol=1e-4, atol=1e-6)


def test_float64_is_refused():
    with launches_on_emulator(), pytest.raises(RuntimeError, match="float64"):
        ck.sinkhorn(torch.randn(4, 5, dtype=torch.float64), epsilon=1.0, backend="cuda")


@pytest.mark.parametrize(("dtype", "size"), ((torch.float32, 4), (torch.bfloat16, 2)))
def test_one_launch_reads_the_scores_once(dtype, size):
    """From memory, for three iterations and the plan, where they fit on chip; and every sector of the plan is written whole."""
    rows, cols = 64, 1024
    reports = []
    solve(torch.rand(rows, cols).to(dtype), (4, 100 * 1024, True), reports, epsilon=0.5)
    ((_, report),) = reports
    sectors = collections.Counter()
    for instruction in report.instructions:
        sectors[instruction["op"]] += instruction["sectors"]
    copies = {op: count for op, count in sectors.items() if op.startswith("cp.async")}
    assert sum(copies.values()) * 32 == rows * cols * size
    assert not any(count for op, count in sectors.items() if op.startswith("ld.global.nc"))  # scores that are read again
    assert sectors["st.global.v4.f32"] * 32 == rows * cols * 4
    loads, stores = report["shared"]["load"], report["shared"]["store"]
    assert loads["wavefronts"] <= (1.0 if size == 4 else 1.3) * loads["ideal"]  # 8 values of v per thread, once a tile
    assert stores["wavefronts"] <= 1.2 * stores["ideal"]  # v as those loads want it


def test_passes_read_no_sector_in_vain():
    """An iteration reads the scores twice, and once more from cache for the plan."""
    rows, cols = 8200, 64
    reports = []
    solve(torch.rand(rows, cols).to(torch.bfloat16), reports=reports, epsilon=0.5, num_iters=1)
    columns, _, row_pass = (report for _, report in reports)
    bytes_of_scores, small = rows * cols * 2, 4 * (rows + cols)  # potentials and marginals
    assert bytes_of_scores <= columns["global"]["unique_load_sectors"] * 32 <= bytes_of_scores + small
    assert row_pass["global"]["unique_load_sectors"] * 32 <= bytes_of_scores + small
    assert row_pass["global"]["store"]["efficiency"] > 0.8
    for access in ("load", "store"):
        assert columns["shared"][access]["wavefronts"] == columns["shared"][access]["ideal"]


H200 = (132, 227 * 1024, True)


@pytest.mark.parametrize(("shape", "copies"), (((1, 64, 151936), 4), ((1, 2048, 4096), 4), ((64, 128, 4096), 3)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_model_of_the_time(shape, copies, dtype):
    """The splits of docs/kernels/sinkhorn_gpu.md use the whole device, keep most scores on chip, and should take so many copies
    of the float32 scores, as an H200 was measured to copy them. Arithmetic; not run on a GPU."""
    copy = {(1, 64, 151936): 24e3, (1, 2048, 4096): 21e3, (64, 128, 4096): 69e3}[shape]  # nanoseconds
    scores = torch.empty(shape, dtype=dtype)
    call = Call(scores, torch.ones(shape[1]), torch.ones(shape[2]), 0.05, 3, None, None)
    with launches_on_emulator(device=H200):
        split = cuda.split(SolveParams.of(call, *call.new_results()))
    blocks = split.blocks_per_item * split.items_at_a_time
    assert 128 <= blocks <= 132
    per_item = scores[0].nbytes
    assert split.score_bytes * split.blocks_per_item >= 0.7 * per_item and split.shared_bytes <= H200[1]
    assert split.nanoseconds <= copies * copy


def test_refuses_other_devices():
    assert "CUDA device" in cuda.unavailable_reason(torch.device("cpu"))
