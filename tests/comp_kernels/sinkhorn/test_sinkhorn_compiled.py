"""The Triton kernels of sinkhorn and alignment_loss as compiled code: no spills, and right answers when the PTX is executed."""

from unittest.mock import patch

import pytest
import torch
from emulation import emulating_launcher, needs_emulator, run_compiled
from kernel_names import ALIGNMENT_LOSS, SINKHORN
from test_sinkhorn import assert_defaults_are_their_values

import comp_kernels as ck
from comp_kernels import reference
from comp_kernels._triton_compile import record, specialization
from comp_kernels.testing import (
    ALIGNMENT_CASES,
    SinkhornCase,
    assert_within_budget,
    make_alignment_inputs,
    make_sinkhorn_inputs,
)

pytestmark = pytest.mark.compiles

SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB per block


def all_kernels(dtype: torch.dtype) -> None:
    """Calls that launch every kernel with the tiles and flags of training."""
    marginals = dict(row_marginals=torch.ones(64), col_marginals=torch.full((5000,), 64 / 5000))
    ck.sinkhorn(torch.zeros(2, 64, 5000, dtype=dtype), epsilon=0.05, num_iters=2, tol=0.01, backend="triton", **marginals)
    ck.sinkhorn(torch.zeros(64, 5000, dtype=dtype), epsilon=0.05, num_iters=1, backend="triton")
    settings = dict(prior=torch.ones(3000), valid=torch.ones(64, dtype=torch.bool), backend="triton")
    for features, words in {(dtype, dtype), (torch.float32, torch.bfloat16)}:
        vision, text = (torch.zeros(64, 576, dtype=features).requires_grad_() for _ in range(2))
        prototypes = torch.zeros(3000, 576, dtype=words)
        for mode in ("sinkhorn", "literal"):
            ck.alignment_loss(vision, text, prototypes, mode=mode, **settings)


def tiles_of(columns: int):
    """Within the context, alignment_loss has that many prototypes per tile; the process goes on with other tests."""
    from comp_kernels.ops.alignment_loss import streaming

    return patch.object(streaming, "tile_columns", lambda num_rows, dim, num_words, limits: min(columns, num_words))


def compiled_code(arch: str, dtype: torch.dtype) -> list:
    from benchmarks.compile_report import read_code

    launches = {specialization(launch, arch): launch for launch in record(lambda: all_kernels(dtype), arch)}
    return [read_code(launch, arch) for launch in launches.values()]


@pytest.mark.parametrize(
    "arch, dtype",
    [
        ("sm_80", torch.float32),
        ("sm_90", torch.bfloat16),
        ("sm_100", torch.bfloat16),
        ("sm_120", torch.float16),
        ("gfx942", torch.float32),
        ("gfx942", torch.bfloat16),
    ],
)
def test_compile_matrix(arch, dtype):
    found = run_compiled(compiled_code, arch, dtype)
    assert len({code.name for code in found}) == 12
    for code in found:
        assert code.spills == 0 and code.shared <= SHARED_LIMIT[arch] * 1024, code.name
        assert code.matrix == 0, code.name


def emulated_sinkhorn(target: int) -> list[str]:
    from comp_kernels._triton import launches_go_to

    reports: list = []
    case = SinkhornCase("emulated", (2, 20, 150), marginals="per_item")
    scores, marginals = make_sinkhorn_inputs(case, torch.bfloat16)
    settings = dict(epsilon=0.1, return_potentials=True, **marginals)
    for tol in (None, 1e-9):
        with launches_go_to(emulating_launcher(reports, target=target), f"sm_{target}"):
            actual = ck.sinkhorn(scores, backend="triton", tol=tol, **settings)
        exact = reference.sinkhorn(scores.double(), **{**settings, **{key: x.double() for key, x in marginals.items()}})
        peer = reference.sinkhorn(scores, **settings)
        for label, *triple in zip(("plan", "u", "v"), actual, exact, peer):
            assert_within_budget(f"sm_{target} {label}", *triple)
        with launches_go_to(emulating_launcher(reports, target=target), f"sm_{target}"):
            assert_defaults_are_their_values((20, 150), "triton", num_iters=2, **({} if tol is None else dict(tol=tol)))
    return [name for name, _ in reports]


def emulated_alignment_loss(target: int, dtype: torch.dtype) -> list[str]:
    from comp_kernels._triton import launches_go_to

    reports: list = []
    inputs = make_alignment_inputs(ALIGNMENT_CASES["several_tiles"], dtype)
    vision, text, prototypes = inputs.features
    settings = dict(prior=inputs.prior, valid=inputs.valid, epsilon=0.05, temperature=0.05)

    def step(function, dtype=dtype, **extra):
        leaf = vision.to(dtype).requires_grad_()
        loss = function(leaf, text.to(dtype), prototypes.to(dtype), **settings, **extra)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    emulated = launches_go_to(emulating_launcher(reports, target=target), f"sm_{target}")
    with tiles_of(256), emulated:
        actual = step(ck.alignment_loss, backend="triton")
    for label, *triple in zip(
        ("loss", "gradient"), actual, step(reference.alignment_loss, torch.float64), step(reference.alignment_loss)
    ):
        assert_within_budget(f"sm_{target} {label}", *triple, factor=4.0 if label == "loss" else 2.0)
    return [name for name, _ in reports]


@needs_emulator
@pytest.mark.emulated
@pytest.mark.parametrize("target", (80, 90))
def test_executed_sinkhorn(target):
    names = set(run_compiled(emulated_sinkhorn, target))
    assert names == SINKHORN


@needs_emulator
@pytest.mark.emulated
@pytest.mark.parametrize("target, dtype", [(80, torch.bfloat16), (90, torch.float32)])
def test_executed_alignment_loss(target, dtype):
    names = set(run_compiled(emulated_alignment_loss, target, dtype))
    assert names == ALIGNMENT_LOSS


def results_under_schedules(seeds) -> list:
    """Plan and potentials, loss and gradient per random warp schedule; reads of unwritten registers raise."""
    from comp_kernels._triton import launches_go_to

    scores, marginals = make_sinkhorn_inputs(SinkhornCase("", (2, 20, 150), marginals="per_item"), torch.bfloat16)
    inputs = make_alignment_inputs(ALIGNMENT_CASES["several_tiles"], torch.bfloat16)
    vision, *others = inputs.features
    results = []
    for seed in seeds:
        leaf = vision.clone().requires_grad_()
        emulated = launches_go_to(emulating_launcher(seed=seed, quantum=7, check_uninit_reg=True), "sm_80")
        with tiles_of(128), emulated:
            solved = ck.sinkhorn(scores, epsilon=0.1, num_iters=2, backend="triton", return_potentials=True, **marginals)
            settings = dict(prior=inputs.prior, valid=inputs.valid, epsilon=0.1, num_iters=2)
            loss = ck.alignment_loss(leaf, *others, backend="triton", **settings)
            (gradient,) = torch.autograd.grad(loss, leaf)
        names = ("plan", "u", "v", "loss", "gradient")
        results.append({name: x.detach().float().numpy() for name, x in zip(names, (*solved, loss, gradient))})
    return results


@needs_emulator
@pytest.mark.emulated
def test_bit_equal_under_any_warp_schedule():
    first, second = run_compiled(results_under_schedules, (1, 2))
    for name, expected in first.items():
        assert (second[name] == expected).all(), name


def sinkhorn_reports(target: int, shape: tuple[int, int]) -> list:
    from comp_kernels._triton import launches_go_to

    reports: list = []
    with launches_go_to(emulating_launcher(reports, target=target), f"sm_{target}"):
        ck.sinkhorn(torch.rand(shape), epsilon=0.1, num_iters=2, backend="triton")
    return [(name, report["global"]) for name, report in reports]


@needs_emulator
@pytest.mark.emulated
@pytest.mark.parametrize("target", (80, 90))
def test_traffic(target):
    """A column step reads the scores once and writes its columns' potentials and the rows' pairs; the plan is one read and one
    write: nothing else comes from memory that the caches do not hold."""
    rows, cols, sector = 64, 2048, 32
    matrix = 4 * rows * cols
    for name, traffic in run_compiled(sinkhorn_reports, target, (rows, cols)):
        moved = (traffic["unique_load_sectors"] + traffic["unique_store_sectors"]) * sector
        compulsory = {"column_step_kernel": matrix + 3 * 4 * cols, "plan_kernel": 2 * matrix + 4 * cols}.get(name)
        assert compulsory is None or moved <= 1.1 * compulsory, (name, moved, compulsory)
