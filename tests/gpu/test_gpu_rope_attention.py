"""rope_attention on the device: errors against float64 by backend and dtype, CUDA graphs, torch.compile, streams, devices.

CUDA kernels, which are compiled already, get all shared cases and longer ones. Triton compiles about five kernels for each new
head size, layout and dtype, seconds of them, so it gets one case of each kind.
"""

from contextlib import contextmanager

import pytest
import torch
from device import DEVICE, HAS_GPU, captured, check_nothing_waits, kernels_of, streams, wait

import comp_kernels as ck
from comp_kernels import _native
from comp_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    check_huge_logits,
    check_median_error,
    check_rope_attention,
    make_attention_inputs,
)

BACKENDS = kernels_of("rope_attention")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def long_cases() -> dict[str, AttentionCase]:
    """Sequences of several tiles at the head sizes that have kernels of their own on sm_90a, and at the largest of all."""
    cases = []
    for d in (64, 72, 80, 96, 128, 192, 256):
        cases += [
            AttentionCase(f"mixed_{d}", [1029, 197, 0, 64, 729], head_dim=d, slack=5),
            AttentionCase(f"edges_{d}", [256, 255, 257, 192, 193], head_dim=d, slack=5),
            AttentionCase(f"gqa_{d}", [300, 0, 500], heads=6, kv_heads=2, head_dim=d),
            AttentionCase(f"tables_{d}", [200, 177], heads=4, kv_heads=2, layout="per_head_interleaved", head_dim=d),
            AttentionCase(f"cross_{d}", [300, 0, 177, 400], lengths_k=[129, 555, 0, 700], head_dim=d, slack=7),
            AttentionCase(f"views_{d}", [130, 265], packed_qkv=True, heads=4, head_dim=d),
        ]
    return {case.name: case for case in cases}


CASES = ATTENTION_CASES | long_cases()
OF_TRITON = {  # dtype -> cases
    "bfloat16": (
        *("layout_half_hwhw_halfwidth", "layout_per_head_interleaved", "no_rope", "slack_of_nan_cross", "logits_of_1e4"),
        *("mixed_64", "mixed_72", "gqa_80", "views_128", "dim_256"),
    ),
    "float16": ("mixed_72", "layout_interleaved"),
    "float32": ("mixed_64", "mixed_72"),
}
ON_THE_CPU = ("layout_half_hwhw", "cross", "logits_of_1e4", "slack_of_nan", "gqa_per_head", "dim_72")  # all are in the suite


def checks() -> list[tuple[str, str, str]]:
    """(backend, dtype, case)."""
    found = []
    for backend in BACKENDS:
        for dtype in DTYPES:
            names = {"cuda": CASES, "triton": OF_TRITON[dtype], "cpu": ON_THE_CPU}[backend]
            # of a single key dP - delta is zero but for a rounding; plain PyTorch has zero
            found += [(backend, dtype, name) for name in names if (dtype, name) != ("float32", "one_token")]
    return found


@pytest.mark.parametrize("backend, dtype, case", checks())
def test_against_float64(backend, dtype, case):
    if case == "logits_of_1e4":  # decided by single roundings of q and k: one draw says nothing
        check_median_error(CASES[case], DTYPES[dtype], backend, device=DEVICE)
    else:
        check_rope_attention(CASES[case], DTYPES[dtype], backend, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_stay_finite(backend, dtype):
    check_huge_logits(DTYPES[dtype], backend, DEVICE)


def inputs_of(lengths, head_dim=72, device=DEVICE, seed=0):
    case = AttentionCase("", lengths, heads=4, head_dim=head_dim, layout="half_hwhw_halfwidth", seed=seed)
    return make_attention_inputs(case, torch.bfloat16, device)


def step_of(x, backend):
    """A function that returns out and the gradients of q, k and v."""
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]

    def step():
        out = ck.rope_attention(*leaves, x.cos, x.sin, x.cu_seqlens, backend=backend, **x.kwargs)
        return out.detach(), *torch.autograd.grad(out, leaves, x.grad_out)

    return step


def assert_equal_bits(found, expected):
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected):
        assert torch.equal(ours, theirs), f"{name} differs in {int((ours != theirs).sum())} of {ours.numel()} values"


@pytest.mark.parametrize("head_dim", (64, 72, 128))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_bits_from_run_to_run(backend, head_dim):
    step = step_of(inputs_of([1029, 197, 0, 64, 729], head_dim), backend)
    first = step()
    for _ in range(3):
        assert_equal_bits(step(), first)


@contextmanager
def switched(**values: int):
    """Within: comp_kernels_cuda_rope_attention_set_* of these names; 0 afterwards."""
    setters = {name: getattr(_native.cuda(), f"comp_kernels_cuda_rope_attention_set_{name}") for name in values}
    for name, value in values.items():
        setters[name](value)
    try:
        yield
        wait()
    finally:
        for setter in setters.values():
            setter(0)


SM90 = pytest.mark.skipif(not HAS_GPU or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0")


@SM90
@pytest.mark.parametrize("head_dim", (64, 72, 80, 96, 128))
def test_what_is_off_by_default_makes_the_same_bits(head_dim):
    step = step_of(inputs_of([1029, 197, 0, 64, 729, 190, 385], head_dim), "cuda")
    expected = step()
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    for values in (
        dict(persistent=blocks),
        dict(persistent=7),
        dict(persistent=blocks, dependent=1),
        dict(dependent=1),
        dict(values_in_place=1),
        dict(values_in_place=1, dependent=1),
    ):
        with switched(**values):
            for _ in range(20):  # calls that follow one another closely, in memory that the one before has just given back
                found = step()
            assert_equal_bits(found, expected)


@SM90
def test_a_cuda_graph_keeps_dependent_launches():
    x = inputs_of([700, 100, 200, 24])
    step = step_of(x, "cuda")
    expected = step()
    with switched(values_in_place=1, dependent=1):
        replay = captured(step)
    for _ in range(20):
        found = replay()
    assert_equal_bits(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_serves_other_lengths(backend):
    """New bounds and values in the same memory, replayed, give what a call gives, to the bit: nothing was read when the graph
    was captured that may change. Lengths go from one long sequence to many short ones, and slack at the end."""
    x = inputs_of([700, 100, 200, 24])
    step = step_of(x, backend)
    replay = captured(step)
    for seed, lengths in enumerate(([700, 100, 200, 24], [0, 1024, 0, 0], [1, 63, 65, 895], [64, 64, 64, 64])):
        fresh = inputs_of([700, 100, 200, 24], seed=seed)
        with torch.no_grad():
            for name in ("q", "k", "v", "grad_out"):
                getattr(x, name).copy_(getattr(fresh, name))
        x.cu_seqlens.copy_(torch.tensor([0, *lengths]).cumsum(0))
        found = [t.clone() for t in replay()]
        assert_equal_bits(found, step())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_in_one_graph(backend):
    """torch.compile(fullgraph=True), for any lengths: what it makes of the operations around gives the same within rounding."""
    x = inputs_of([300, 20, 177])

    def function(q, k, v, cos, sin, cu_seqlens):
        return ck.rope_attention(q * 2, k, v, cos, sin, cu_seqlens, backend=backend, **x.kwargs) + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="inductor" if HAS_GPU else "aot_eager")
    for lengths in ([300, 20, 177], [64, 65]):
        y = inputs_of(lengths)
        leaves = [t.requires_grad_() for t in (y.q, y.k, y.v)]
        results = []
        for f in (function, compiled):
            out = f(*leaves, y.cos, y.sin, y.cu_seqlens)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, y.grad_out)))
        for expected, found in zip(*results):
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams(backend):
    """Calls that run side by side share no memory, workspaces included."""
    steps = [step_of(inputs_of(lengths, seed=seed), backend) for seed, lengths in enumerate(([2000, 30], [64] * 40))]
    expected = [step() for step in steps]
    wait()
    contexts, found = streams(len(steps)), [[] for _ in steps]
    for _ in range(10):
        for step, stream, results in zip(steps, contexts, found):
            with stream:
                results.append(step())
    wait()
    for results, right in zip(found, expected):
        for result in results:
            assert_equal_bits(result, right)


@pytest.mark.skipif(HAS_GPU and torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_on_another_device_than_the_current_one(backend):
    expected = step_of(inputs_of([130, 65]), backend)()
    other = f"cuda:{torch.cuda.device_count() - 1}" if HAS_GPU else "cpu"
    found = step_of(inputs_of([130, 65], device=other), backend)()
    assert all(t.device == torch.device(other) for t in found)
    assert_equal_bits([t.to(DEVICE) for t in found], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend):
    """Neither forward nor backward copies to the host."""
    check_nothing_waits(step_of(inputs_of([130, 65]), backend))
