"""The Triton rope_attention: in the interpreter (on the device where there is one), and what the compiler makes of it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from emulation import run_compiled

import comp_kernels as ck
from comp_kernels._triton import launches_go_to
from comp_kernels._triton_compile import record
from comp_kernels.ops.rope_attention import triton_backend, triton_configs
from comp_kernels.ops.rope_attention.call import Call
from comp_kernels.testing import (
    ATTENTION_CASES,
    LAYOUTS,
    AttentionCase,
    assert_within_budget,
    attention_with_gradients,
    check_rope_attention,
    make_attention_inputs,
    plain_rope_attention,
)

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def workspace(monkeypatch):
    """Keys are rotated once, into a workspace, however short the sequences."""
    monkeypatch.setattr(triton_configs, "INLINE_LENGTH", 0)


def gradients(inputs, backend="triton"):
    return attention_with_gradients(inputs, lambda *a, **k: ck.rope_attention(*a, return_lse=True, backend=backend, **k))


def exact_gradients(inputs):
    return attention_with_gradients(
        inputs, lambda *a, **k: ck.reference.rope_attention(*a, return_lse=True, **k), torch.float64
    )


def call_of(inputs):
    """As the backend gets it: one table for queries and keys, one set of bounds."""
    tables, bounds = (inputs.cos, inputs.sin) * 2, (inputs.cu_seqlens,) * 2
    return Call(inputs.q, inputs.k, inputs.v, *tables, *bounds, rotary_dim=24, pair_stride=12, scale=0.2)


# Left out where the interpreter runs, for its slowness: dim_72 and 256 and gqa_per_head take the same paths. The next two
# tests have the two cases that need budgets of their own.
SLOW = {"dim_32", "dim_64", "dim_80", "dim_88", "dim_96", "dim_128", "gqa"} if DEVICE == "cpu" else set()


@pytest.mark.parametrize("name", [n for n in ATTENTION_CASES if n not in SLOW | {"one_token", "logits_of_1e4"}])
def test_matches_definition(name, workspace):
    check_rope_attention(ATTENTION_CASES[name], torch.float32, "triton", DEVICE)


def test_single_token(workspace):
    """One key: the gradient of the scores cancels to zero, up to the rounding of two sums in different orders."""
    result = gradients(make_attention_inputs(ATTENTION_CASES["one_token"], device=DEVICE))
    exact = exact_gradients(make_attention_inputs(ATTENTION_CASES["one_token"], device=DEVICE))
    for name, value in exact.items():
        torch.testing.assert_close(result[name].double(), value, rtol=1e-5, atol=2e-6)


def test_large_logits(workspace):
    """Logits of 1e4: the weights that the backward recomputes are those of the forward, since lse comes back without rounding.

    That holds where both compute the same scores bit for bit. The kernel of dk and dv computes them transposed; on a GPU each
    score sums over the channels in the same order, in the interpreter (BLAS) it does not, and 1e4 roundings of a score show.
    """
    inputs = make_attention_inputs(ATTENTION_CASES["logits_of_1e4"], device=DEVICE)
    result, exact = gradients(inputs), exact_gradients(inputs)
    peer = attention_with_gradients(inputs, plain_rope_attention)
    for name in ("out", "lse", "dq"):
        assert_within_budget(name, result[name], exact[name], peer[name])
    for name in ("dk", "dv", "dcos", "dsin"):
        limit = 2e4 * torch.finfo(torch.float32).eps * exact[name].abs().max()
        assert (result[name] - exact[name]).abs().max() <= limit, name


@pytest.mark.parametrize(
    "name", [f"layout_{layout}" for layout in LAYOUTS] + ["dim_72", "gqa_per_head", "cross", "slack_of_nan"]
)
def test_rotation_in_the_loop_changes_nothing(name, monkeypatch):
    """Bit for bit: the same key rows, rotated and rounded in another place."""
    inputs = make_attention_inputs(ATTENTION_CASES[name], device=DEVICE)

    def forward(inline):
        monkeypatch.setattr(triton_configs, "rotate_keys_inline", lambda *sizes: inline)
        return ck.rope_attention(
            inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="triton", **inputs.kwargs
        )

    assert torch.equal(forward(False), forward(True))


@pytest.mark.parametrize("name", ("layout_half_hwhw", "slack_of_nan"))
def test_half_precision(name, workspace):
    """float16; bfloat16 runs on the emulator, the interpreter cannot multiply it."""
    check_rope_attention(ATTENTION_CASES[name], torch.float16, "triton", DEVICE)


def test_code_for_float32_on_nvidia(workspace, monkeypatch):
    """Halves of 11 bits, chunks of 32 channels, every tile checked, dv and dk apart: the same, whatever runs it."""
    case = AttentionCase("two_chunks", [18, 0], heads=2, kv_heads=1, head_dim=40, slack=3)
    monkeypatch.setattr(triton_backend, "dot_precision", lambda arch, dtype: "tf32x3")
    monkeypatch.setattr(triton_configs, "INTERPRETED", triton_configs.TileConfig(16, 16, 1, 1, num_passes=2))
    check_rope_attention(case, torch.float32, "triton", DEVICE)


@pytest.mark.parametrize("name", ("layout_half_hwhw_halfwidth", "layout_not_orthogonal", "gqa_per_head", "slack_of_nan_cross"))
def test_gradients_with_and_without_those_of_the_tables(name, workspace):
    """Without them the rotation goes back inside the kernels, with them in a kernel of its own: same numbers."""
    inputs = make_attention_inputs(ATTENTION_CASES[name], device=DEVICE)
    with_tables = gradients(inputs)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = ck.rope_attention(
        *leaves, inputs.cos, inputs.sin, inputs.cu_seqlens, return_lse=True, backend="triton", **inputs.kwargs
    )
    alone = torch.autograd.grad(
        (out, lse), leaves, (inputs.grad_out, inputs.grad_lse.where(lse.isfinite(), torch.zeros_like(lse)))
    )
    for name, gradient in zip(("dq", "dk", "dv"), alone):
        assert torch.equal(gradient, with_tables[name]), name


@pytest.mark.parametrize("scale", (-0.7, 0.0))
def test_negative_and_zero_scale(scale, workspace):
    case = AttentionCase("scale", [20, 35], scale=scale)
    inputs = make_attention_inputs(case, device=DEVICE)
    inputs.kwargs["scale"] = scale
    result, exact = gradients(inputs), gradients(inputs, "reference")
    for name, value in exact.items():
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-5)


def test_agrees_with_the_cpu_kernel(workspace):
    if "cpu" not in ck.available_backends("rope_attention", "cpu"):
        pytest.skip("the CPU library is not built")
    inputs = make_attention_inputs(dataclasses.replace(ATTENTION_CASES["dim_72"], lengths=[33, 20]))
    triton, cpu = gradients(inputs), gradients(inputs, "cpu")
    for name in cpu:
        torch.testing.assert_close(triton[name].cpu(), cpu[name], rtol=1e-4, atol=1e-5)


def test_nothing_is_read_from_the_device(workspace, monkeypatch):
    """No value of a tensor reaches Python on the way: forward and backward never wait for the device."""

    def forbidden(*args, **kwargs):
        raise AssertionError("synchronises with the device")

    inputs = make_attention_inputs(ATTENTION_CASES["layout_half_hwhw"], device=DEVICE)
    call, launches = call_of(inputs), []
    with launches_go_to(lambda kernel, grid, *args, **kwargs: launches.append(kernel), "sm_80"):
        for method in ("item", "tolist", "__int__", "__bool__", "__index__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, method, forbidden)
        out, lse = triton_backend.forward(call)
        triton_backend.backward(call, out, lse, inputs.grad_out, inputs.grad_lse, table_grads=True)
        monkeypatch.undo()
    assert launches


@pytest.mark.parametrize("arch, in_epilogue", [("sm_80", True), ("gfx942", False)])
def test_gradients_are_turned_in_the_epilogue_on_nvidia_only(arch, in_epilogue):
    """The epilogue reads what other threads wrote before a barrier; AMD's does not wait for global memory."""
    launches = {}
    inputs = make_attention_inputs(ATTENTION_CASES["layout_half_hwhw"])
    with launches_go_to(lambda kernel, grid, *args, **kwargs: launches.update({kernel.__name__: kwargs}), arch):
        triton_backend.backward(call_of(inputs), inputs.q, inputs.grad_lse, inputs.grad_out, None, table_grads=False)
    assert launches["query_gradient_kernel"]["UNROTATE"] == launches["key_value_gradient_kernel"]["UNROTATE"] == in_epilogue
    assert ("unrotate_kernel" in launches) != in_epilogue


def test_refusals():
    x = torch.zeros(3, 1, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="float64"):
        ck.rope_attention(x, x, x, backend="triton")
    x = torch.zeros(3, 1, 272, device=DEVICE)
    with pytest.raises(RuntimeError, match="at most 256, got 272"):
        ck.rope_attention(x, x, x, backend="triton")


# --- sizes and configurations ------------------------------------------------------------------------------------------------


def test_head_dims_cost_multiples_of_16():
    for head_dim, widest in itertools.product(range(1, 257), (32, 64, 128)):
        chunks = triton_backend.head_chunks(head_dim, widest)
        assert sum(width for _, width in chunks) == -(-head_dim // 16) * 16
        assert all(16 <= width <= widest and width & (width - 1) == 0 for _, width in chunks)
        assert [first for first, _ in chunks] == [sum(w for _, w in chunks[:i]) for i in range(len(chunks))]


@pytest.mark.parametrize("release, passes, stages", [("3.6", 1, 2), ("3.8", 2, 1), ("3.9", 1, 2)])
def test_configurations_by_version_of_triton(release, passes, stages, monkeypatch):
    """3.8 alone has others, for the float32 backward of mma.sync up to 128 channels: nowhere else did it spill in loops."""
    monkeypatch.setattr(triton_configs, "triton_release", lambda: release)

    def config(kernel, arch="sm_80", head_dim=72, dtype=torch.float32):
        return triton_configs.table_config(kernel, arch, head_dim, dtype)

    for arch in ("sm_80", "sm_86", "sm_120"):
        assert (config("key_value_gradient", arch).num_passes, config("query_gradient", arch).num_stages) == (passes, stages)
    usual = [config(*case) for case in (("forward",), ("key_value_gradient", "sm_90"), ("query_gradient", "sm_80", 256))]
    usual.append(config("query_gradient", dtype=torch.bfloat16))
    assert [(x.num_passes, x.num_stages) for x in usual] == [(1, 2)] * 4


@pytest.mark.parametrize("kernel", ("forward", "query_gradient", "key_value_gradient"))
@pytest.mark.parametrize("head_dim", (64, 72, 128, 256))
def test_a_large_chip_tries_all_that_a_small_one_does(kernel, head_dim):
    small, large = (triton_configs.candidates(kernel, head_dim, 2, kib * 1024) for kib in (99, 227))
    assert small and set(small) <= set(large)
    assert triton_configs.candidates(kernel, min(head_dim, 128), 4, 99 * 1024)


def test_autotuning_keeps_the_fastest_and_skips_what_the_chip_refuses():
    from triton.runtime.errors import OutOfResources

    configs = triton_configs.candidates("forward", 128, 2, shared_limit=100 * 1024)
    best = configs[3]

    def time(run):
        config = run()
        if config == configs[0]:
            raise OutOfResources(required=2, limit=1, name="shared memory")
        return float(config != best)

    assert triton_configs.fastest(configs, lambda config: config, time) == best


def test_autotuning_measures_once_per_kernel_head_dim_and_dtype(monkeypatch):
    """With a false clock and false device properties: which calls are timed, and what is chosen. Not that a choice is fast."""
    asked, winner = [], triton_configs.TileConfig(64, 64, 4, 2)

    def run(config):
        asked.append(config)
        return config

    class Properties:
        shared_memory_per_block = 48 * 1024
        shared_memory_per_block_optin = 163 * 1024

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(triton_configs, "time_on_device", lambda call: float(call() != winner))
    monkeypatch.setattr(triton_configs, "_measured", {})
    default = triton_configs.table_config("forward", "sm_80", 64, torch.bfloat16)

    def choose(kernel="forward", head_dim=64, dtype=torch.bfloat16, device="cuda"):
        asked.clear()
        return triton_configs.choose_config(kernel, "sm_80", head_dim, dtype, torch.device(device), run)

    assert choose() == default and not asked  # off unless asked for
    monkeypatch.setenv(triton_configs.AUTOTUNE_VARIABLE, "1")
    assert choose(device="cpu") == default and not asked  # nothing to time
    assert choose() == winner
    assert asked[0] == default and set(asked) == {default, *triton_configs.candidates("forward", 64, 2, 163 * 1024)}
    assert choose() == winner and not asked  # measured already
    for changed in (dict(kernel="query_gradient"), dict(head_dim=80), dict(dtype=torch.float16)):
        choose(**changed)
        assert asked, changed


# --- compiled code -----------------------------------------------------------------------------------------------------------


def compiled_code(arch, dtype, head_dim, layout, backward):
    """Facts about the kernels that `arch` would run for packed sequences (see benchmarks/compile_report.py)."""
    from benchmarks.compile_report import attention_call, read_code

    case = AttentionCase("compiled", [1024, 361], heads=2, head_dim=head_dim, layout=layout)
    launches = record(attention_call(dtype, case, backward=backward), arch)
    return {launch.name: read_code(launch, arch) for launch in launches}


SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB per block


@pytest.mark.compiles
@pytest.mark.parametrize(
    "arch, dtype, head_dim, layout, backward",
    [
        ("sm_80", torch.bfloat16, 72, "half_hwhw_halfwidth", True),
        ("sm_80", torch.bfloat16, 72, "interleaved", False),
        ("sm_80", torch.float32, 72, "half_hwhw_halfwidth", True),
        ("sm_90", torch.bfloat16, 256, "half_hwhw", False),
        ("sm_100", torch.bfloat16, 64, "half_hwhw", False),
        ("sm_120", torch.bfloat16, 96, "per_head_interleaved", False),
        ("gfx942", torch.float16, 88, "partial", True),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_compile_matrix(arch, dtype, head_dim, layout, backward):
    """A part of the matrix that the report covers: matrix instructions, shared memory that exists, no spills in loops, and none
    at all with the Triton that the configurations were chosen with (others: docs/compile_report.md)."""
    for name, code in run_compiled(compiled_code, arch, dtype, head_dim, layout, backward).items():
        assert code.shared <= SHARED_LIMIT[arch] * 1024, name
        if name == "attention_forward_kernel" or "gradient" in name:
            assert code.matrix > 0, name
        if name == "attention_forward_kernel" or ("gradient" in name and arch == "sm_80"):
            assert code.loop["spill"] == 0, name
            assert code.spills == 0 or triton_configs.triton_release() != "3.9", name


@pytest.mark.compiles
def test_no_trace_of_the_rotation_in_the_loop():
    """Long sequences: the hottest loop is that without rotary embedding, but for a few register moves and addresses.

    Those two depend on how the code around the loop has filled the registers: with other tables there are more or fewer.
    """
    rotated, plain = (
        run_compiled(compiled_code, "sm_80", torch.bfloat16, 64, layout, False)["attention_forward_kernel"].loop
        for layout in ("half_hwhw", None)
    )
    assert rotated["matrix"] > 0
    allocation = {"move": 0, "integer": 0}
    assert rotated | allocation == plain | allocation
    assert rotated.total() <= 1.01 * plain.total()


@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces the products of Triton's interpreter")
@pytest.mark.parametrize("magnitude", (1e6, 1e18, 1e30))
def test_gradients_of_huge_logits(magnitude, monkeypatch):
    """Both passes find the same weights where both find the same scores, as hardware does that sums channels in one order.

    The interpreter's products are NumPy's, whose order depends on the shapes: here they are rounded once.
    """
    matmul = np.matmul

    def rounded_once(a, b, dtype):
        return matmul(a.astype(np.float64), b.astype(np.float64)).astype(dtype)

    inputs = make_attention_inputs(AttentionCase("huge", [20, 9], layout=None))
    inputs.q = inputs.q * magnitude
    exact = exact_gradients(inputs)
    monkeypatch.setattr(np, "matmul", rounded_once)
    found = gradients(inputs)
    for name, x in found.items():
        torch.testing.assert_close(x.double(), exact[name], rtol=1e-5, atol=1e-6 * magnitude if name == "dk" else 1e-6)
