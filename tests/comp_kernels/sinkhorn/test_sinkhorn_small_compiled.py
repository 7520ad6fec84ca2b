"""The Triton kernels of sinkhorn over many small matrices compiled: no spills, right answers when the PTX is executed."""

import pytest
import torch
from emulation import emulating_launcher, needs_emulator, run_compiled
from test_sinkhorn import assert_defaults_are_their_values
from test_sinkhorn_small import KINDS, assert_equals_the_definition, random_marginals

import comp_kernels as ck

pytestmark = pytest.mark.compiles

EXECUTED = [
    ((150, 4, 4), "mixed", 0.0, "rows_cols"),
    ((7, 3, 9), "ordinary", 1e-4, "cols_rows"),
    ((3, 17, 30), "mixed", 0.0, "cols_rows"),
]


def compiled_code(arch: str, shape: tuple[int, ...], dtype: torch.dtype) -> list:
    from benchmarks.compile_report import Launch, read_code
    from comp_kernels._triton import launches_go_to

    launches = {}

    def recorder(kernel, grid, *args, num_warps, num_stages, **constexprs):
        key = (kernel.__name__, constexprs["HAS_EPS"])
        launches.setdefault(key, Launch(kernel, grid, args, constexprs, num_warps, num_stages))

    with launches_go_to(recorder, arch):
        for eps in (0.0, 1e-6):
            scores = torch.zeros(shape, dtype=dtype, requires_grad=True)
            plan = ck.sinkhorn(
                scores, epsilon=1.0, num_iters=20, order="rows_cols", eps=eps, gradient="unrolled", backend="triton"
            )
            plan.sum().backward()
    return [read_code(launch, arch) for launch in launches.values()]


@pytest.mark.parametrize(
    "arch, shape, dtype",
    [
        ("sm_80", (4096, 4, 4), torch.float32),
        ("sm_90", (4096, 4, 4), torch.bfloat16),
        ("sm_90", (512, 8, 8), torch.float32),
        ("sm_120", (64, 32, 32), torch.float16),
        ("gfx942", (4096, 4, 4), torch.float32),
    ],
)
def test_compile_matrix(arch, shape, dtype):
    found = run_compiled(compiled_code, arch, shape, dtype)
    assert [code.name for code in found] == ["small_forward_kernel", "small_backward_kernel"] * 2
    for code in found:
        assert code.spills == 0, (code.name, code.spills)


def executed(target: int) -> list[str]:
    from comp_kernels._triton import launches_go_to

    torch.manual_seed(0)
    reports: list = []
    for shape, kind, eps, order in EXECUTED:
        marginals = random_marginals(shape, per_item=True) if shape == (7, 3, 9) else {}
        scores = KINDS[kind](shape).float()
        with launches_go_to(emulating_launcher(reports, target=target), f"sm_{target}"):
            assert_equals_the_definition(scores, marginals, "triton", epsilon=0.7, num_iters=3, order=order, eps=eps)
    with launches_go_to(emulating_launcher([], target=target), f"sm_{target}"):
        # Compiled for no marginals, other products are fused with other sums.
        assert_defaults_are_their_values((5, 4, 7), "triton", same_bits=False, order="rows_cols")
    return [name for name, _ in reports]


@needs_emulator
@pytest.mark.emulated
@pytest.mark.parametrize("target", (80, 90))
def test_executed(target):
    assert run_compiled(executed, target) == ["small_forward_kernel", "small_backward_kernel"] * len(EXECUTED)


def traffic_of_training() -> list:
    from comp_kernels._triton import launches_go_to

    reports: list = []
    logits = torch.randn(1024, 4, 4, requires_grad=True)
    with launches_go_to(emulating_launcher(reports, target=90), "sm_90"):
        plan = ck.sinkhorn(logits, epsilon=1.0, num_iters=4, order="rows_cols", gradient="unrolled", backend="triton")
        plan.backward(torch.randn(1024, 4, 4))
    return [report["global"] for _, report in reports]


@needs_emulator
@pytest.mark.emulated
def test_traffic():
    """Scores are read and results written once; the backward pass adds its scratch memory, two vectors per iteration."""
    forward, backward = run_compiled(traffic_of_training)
    matrices, vector, sector = 1024 * 64, 1024 * 16, 32  # bytes
    assert forward["unique_load_sectors"] * sector <= matrices + 256
    assert forward["unique_store_sectors"] * sector <= matrices + 2 * vector
    assert backward["unique_store_sectors"] * sector <= matrices + 2 * 5 * vector
    assert backward["unique_load_sectors"] * sector <= 2 * matrices + 2 * 5 * vector + 256
