"""The CUDA kernels of sinkhorn over many small matrices, on ptx_emulator: results, gradients, one launch each way, traffic."""

import pytest
import torch
from cuda_emulation import launches_on_emulator, needs_cuda_emulation
from test_sinkhorn import assert_defaults_are_their_values
from test_sinkhorn_small import KINDS, ORDERS, assert_equals_the_definition, random_marginals

import comp_kernels as ck

pytestmark = [pytest.mark.emulated, needs_cuda_emulation]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape, kind, eps, dtype", [
    ((37, 4, 4), "mixed", 0.0, torch.float32),
    ((18, 2, 1), "wide", 0.0, torch.float32),
    ((11, 8, 6), "mixed", 0.0, torch.bfloat16),
    ((6, 3, 13), "mixed", 0.0, torch.float32),
    ((3, 31, 9), "mixed", 0.0, torch.float16),
    ((37, 4, 4), "ordinary", 1e-6, torch.bfloat16),
    ((5, 7, 8), "wide", 1e-3, torch.float32),
    ((2, 17, 32), "ordinary", 1e-3, torch.float32),
])  # fmt: skip
def test_equals_the_definition_with_gradients(order, shape, kind, eps, dtype):
    marginals = random_marginals(shape, per_item=True) if shape in ((11, 8, 6), (5, 7, 8)) else {}
    with launches_on_emulator():
        assert_equals_the_definition(
            KINDS[kind](shape).to(dtype), marginals, "cuda", epsilon=0.7, num_iters=3, order=order, eps=eps
        )


@pytest.mark.parametrize("order", ORDERS)
def test_default_marginals_are_their_values(order):
    with launches_on_emulator():
        assert_defaults_are_their_values((5, 4, 7), "cuda", order=order)


def test_more_iterations_than_shared_memory_holds():
    with launches_on_emulator():
        assert_equals_the_definition(torch.randn(3, 4, 4), {}, "cuda", epsilon=1.0, num_iters=60, order="rows_cols")


def test_one_launch_forward_and_one_backward():
    """Scores are read and results written once; what iterations need stays on the chip."""
    logits, reports = torch.randn(256, 4, 4, requires_grad=True), []
    with launches_on_emulator(reports):
        plan = ck.sinkhorn(logits, epsilon=1.0, num_iters=20, order="rows_cols", gradient="unrolled", backend="cuda")
        plan.backward(torch.randn(256, 4, 4))
    assert [name for name, _ in reports] == ["sinkhorn_small_forward_fp32_4", "sinkhorn_small_backward_fp32_4"]
    matrices, sides = 256 * 16 * 4, 2 * 256 * 4 * 4  # bytes
    (forward, backward), small = (report["global"] for _, report in reports), 4 * 32
    assert forward["unique_load_sectors"] * 32 <= matrices + small
    assert forward["unique_store_sectors"] * 32 <= matrices + sides
    assert backward["unique_load_sectors"] * 32 <= 2 * matrices + small
    assert backward["unique_store_sectors"] * 32 <= matrices
