"""The CUDA kernels of rope_attention, executed on ptx_emulator: host code, kernels, errors against float64, and counters."""

import ctypes
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from cuda_emulation import attention_source, launches_on_emulator, needs_cuda_emulation

from comp_kernels import _native, reference, rope_attention
from comp_kernels._sources import INCLUDES
from comp_kernels.ops.rope_attention import cuda, native
from comp_kernels.ops.rope_attention.call import Call
from comp_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    assert_within_budget,
    attention_with_gradients,
    check_huge_logits,
    check_median_error,
    check_rope_attention,
    make_attention_inputs,
    plain_rope_attention,
)

emulated = [pytest.mark.emulated, needs_cuda_emulation]

# logits_of_1e4 rounds q and k after the rotation, as the peer does, and then a near tie decides: see test_large_logits
HOSTILE = [case for name, case in ATTENTION_CASES.items() if case.head_dim <= 32 and name != "logits_of_1e4"]

SIZES = [
    AttentionCase("tiles_64", [200, 1, 0, 129, 64], head_dim=64),
    AttentionCase("cross_64", [3, 140, 0], lengths_k=[130, 20, 7], head_dim=64, kv_heads=1),
    AttentionCase("tiles_72", [33, 190, 0, 17], head_dim=72),
    AttentionCase("partial_72", [30, 71], head_dim=72, layout="partial", packed_qkv=True),
    AttentionCase("tiles_128", [130, 0, 47], head_dim=128),
    AttentionCase("cross_128", [40, 9], lengths_k=[5, 90], head_dim=128, slack=3),
    AttentionCase("padded_88", [70, 21], head_dim=88),
    AttentionCase("wide_192", [70, 0, 37], head_dim=192, heads=2, kv_heads=1, slack=3),
    AttentionCase("wide_256", [67, 33], head_dim=256, heads=2),
]
# Not one_token: of a single key dP - delta is zero but for the rounding of dP, and plain PyTorch has zero.
FLOAT32 = [
    *(ATTENTION_CASES[f"layout_{name}"] for name in ("half_hwhw_halfwidth", "interleaved", "quarter_hhww", "not_orthogonal")),
    *(
        ATTENTION_CASES[name]
        for name in ("awkward", "only_empty", "gqa_per_head", "cross", "slack_of_nan_cross", "views_of_qkv")
    ),
    *(ATTENTION_CASES[name] for name in ("dim_2", "dim_10")),
    *SIZES,
    AttentionCase("cross_256", [40, 9], lengths_k=[5, 90], head_dim=256, heads=2, kv_heads=1),
]


class TestAgainstTheReference:
    pytestmark = emulated

    @pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
    def test_hostile_cases(self, case):
        with launches_on_emulator():
            check_rope_attention(case, torch.bfloat16, "cuda")

    @pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
    def test_head_dims_and_mixes(self, case):
        with launches_on_emulator(check_uninit_reg=True):
            check_rope_attention(case, torch.bfloat16, "cuda")

    @pytest.mark.parametrize("case", [SIZES[0], SIZES[2], SIZES[4], SIZES[-1]], ids=lambda case: case.name)
    def test_float16(self, case):
        with launches_on_emulator():
            check_rope_attention(case, torch.float16, "cuda")

    @pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
    def test_float32(self, case):
        """Three TF32 products are as exact as float32."""
        reports = []
        with launches_on_emulator(reports, check_uninit_reg=True):
            check_rope_attention(case, torch.float32, "cuda")
        assert all("tf32x3" in name for name, _ in reports if "prepare" not in name)

    @pytest.mark.parametrize("case", [SIZES[0], SIZES[4], SIZES[-1]], ids=lambda case: case.name)
    def test_tf32(self, case):
        """One TF32 product, where torch's own products may: 11 significant bits, those of float16."""
        inputs = make_attention_inputs(case, torch.float32)
        reports = []
        torch.set_float32_matmul_precision("high")
        try:
            with launches_on_emulator(reports):
                actual = attention_with_gradients(
                    inputs, lambda *args, **kwargs: rope_attention(*args, return_lse=True, backend="cuda", **kwargs)
                )
        finally:
            torch.set_float32_matmul_precision("highest")
        assert not any("tf32x3" in name for name, _ in reports)
        exact = attention_with_gradients(inputs, reference_with_lse, torch.float64)
        peer = attention_with_gradients(inputs, plain_rope_attention, torch.float16)
        for name, value in exact.items():
            assert_within_budget(f"{case.name} {name}", actual[name], value, peer[name])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_large_logits(self, dtype):
        case = AttentionCase("logits_of_1e4", [40, 9], layout=None, magnitude=50.0)
        with launches_on_emulator():
            check_rope_attention(case, dtype, "cuda")

    @pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, None), (torch.bfloat16, "half_hwhw")], ids=str)
    def test_large_logits_that_are_rounded(self, dtype, layout):
        """Of single draws the nearest tie of two keys decides: here from 0 to 11 times plain PyTorch's error."""
        case = AttentionCase("logits_of_1e4", [40, 9], layout=layout, magnitude=50.0)
        with launches_on_emulator():
            check_median_error(case, dtype, "cuda")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize(("capability", "short"), [(80, 0), (90, 0), (90, 256)])
    def test_huge_logits(self, dtype, capability, short):
        with launches_on_emulator(capability=capability, short=short):
            check_huge_logits(dtype, "cuda")

    def test_scores_that_rise_along_the_keys(self):
        """Every tile outgrows the reference of the tiles before, up and beyond what float16 holds."""
        inputs = make_attention_inputs(AttentionCase("rising", [200], head_dim=64, heads=1, layout=None), torch.float16)
        q = torch.ones_like(inputs.q)
        k = inputs.k * 0.01 + torch.linspace(-8, 8, 200, dtype=torch.float16)[:, None, None] * 0.5  # scores from -32 to 32
        with launches_on_emulator():
            out, lse = rope_attention(q, k, inputs.v, return_lse=True, backend="cuda")
        exact, exact_lse = reference.rope_attention(q.double(), k.double(), inputs.v.double(), return_lse=True)
        rounded, rounded_lse = reference.rope_attention(q, k, inputs.v, return_lse=True)
        assert_within_budget("out", out, exact, rounded)
        assert_within_budget("lse", lse, exact_lse, rounded_lse.half())

    @pytest.mark.parametrize(("capability", "lengths"), [(80, [40, 9]), (90, [140])])
    @pytest.mark.parametrize("scale", [-0.3, 0.0])
    def test_scales_that_are_not_positive(self, scale, capability, lengths):
        """Keys beyond the end of a sequence weigh nothing all the same."""
        inputs = make_attention_inputs(AttentionCase("scale", lengths, head_dim=64, heads=1, layout=None), torch.bfloat16)
        tensors = (inputs.q, inputs.k, inputs.v)
        with launches_on_emulator(capability=capability):
            out = rope_attention(*tensors, cu_seqlens=inputs.cu_seqlens, scale=scale, backend="cuda")
        exact = reference.rope_attention(*(x.double() for x in tensors), cu_seqlens=inputs.cu_seqlens, scale=scale)
        rounded = reference.rope_attention(*tensors, cu_seqlens=inputs.cu_seqlens, scale=scale)
        assert_within_budget("out", out, exact, rounded)

    def test_gradients_do_not_depend_on_the_schedule(self):
        inputs = make_attention_inputs(AttentionCase("seeds", [70, 33], head_dim=64, kv_heads=1), torch.bfloat16)
        tensors = (inputs.q, inputs.k, inputs.v)

        def gradients(seed: int):
            leaves = [x.clone().requires_grad_() for x in tensors]
            with launches_on_emulator(seed=seed, quantum=20 + seed):
                out = rope_attention(*leaves, cu_seqlens=inputs.cu_seqlens, backend="cuda")
                return torch.autograd.grad(out, leaves, inputs.grad_out)

        for one, two in zip(gradients(1), gradients(2)):
            assert torch.equal(one, two)


def reference_with_lse(*args, **kwargs):
    return reference.rope_attention(*args, return_lse=True, **kwargs)


SM90 = [
    (AttentionCase("tiles", [300, 1, 0, 129], head_dim=64), torch.bfloat16),
    (AttentionCase("cross", [70, 40], lengths_k=[0, 260], head_dim=64, heads=2, kv_heads=1, slack=5), torch.float16),
    (AttentionCase("tiles", [290, 33], head_dim=72), torch.bfloat16),
    (AttentionCase("plain", [140, 0, 300], head_dim=128, layout=None), torch.bfloat16),
]


class TestSm90Forward:
    """The wgmma kernel: results, and that no register or shared byte is used while an asynchronous product still owns it."""

    pytestmark = emulated

    @pytest.mark.parametrize(("case", "dtype"), SM90, ids=[f"{case.name}_{case.head_dim}" for case, _ in SM90])
    def test_matches_the_reference(self, case, dtype):
        inputs = make_attention_inputs(case, dtype)
        tensors = (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin)
        bounds = dict(cu_seqlens=inputs.cu_seqlens, **inputs.kwargs)
        reports = []
        with launches_on_emulator(reports, capability=90, check_wgmma_regs=True, check_proxy=True):
            actual = rope_attention(*tensors, **bounds, return_lse=True, backend="cuda")
        widened = {name: x.double() if name in ("cos_k", "sin_k") else x for name, x in bounds.items()}
        exact = reference.rope_attention(*(x if x is None else x.double() for x in tensors), **widened, return_lse=True)
        for name, found, truth, peer in zip(("out", "lse"), actual, exact, plain_rope_attention(*tensors, **bounds)):
            assert_within_budget(f"{case.name} {name}", found, truth, peer)
        assert [name.split("_")[2] for name, _ in reports] == ["images", "forward"]
        assert reports[-1][0].startswith("rope_attention_forward_sm90")
        assert reports[-1][1]["local_bytes"] == 0

    def test_other_head_dims_take_the_sm80_kernel(self):
        inputs = make_attention_inputs(AttentionCase("small", [20], head_dim=16), torch.bfloat16)
        reports = []
        with launches_on_emulator(reports, capability=90), torch.no_grad():
            rope_attention(inputs.q, inputs.k, inputs.v, backend="cuda")
        assert [name for name, _ in reports] == ["rope_attention_prepare_bf16", "rope_attention_forward_bf16_32"]


SM90_BACKWARD = [
    (AttentionCase("tiles", [400, 0, 380], head_dim=64, heads=2, kv_heads=1, slack=5), torch.bfloat16),
    (AttentionCase("cross", [270, 260], lengths_k=[0, 530], head_dim=72, heads=1, kv_heads=1, slack=3), torch.float16),
    (AttentionCase("tables", [257], head_dim=80, heads=1, layout="per_head_interleaved"), torch.bfloat16),
    (AttentionCase("plain", [270], head_dim=96, heads=1, layout=None), torch.bfloat16),
    (AttentionCase("tiles", [260], head_dim=128, heads=1), torch.bfloat16),
]


class TestSm90Backward:
    pytestmark = emulated

    @pytest.mark.parametrize(
        ("case", "dtype"), SM90_BACKWARD, ids=[f"{case.name}_{case.head_dim}" for case, _ in SM90_BACKWARD]
    )
    def test_gradients(self, case, dtype):
        reports = []
        with launches_on_emulator(reports, capability=90, check_wgmma_regs=True, check_proxy=True):
            check_rope_attention(case, dtype, "cuda")
        names = [name for name, _ in reports]
        assert [name.rsplit("_", 2)[0] for name in names[-2:]] == [
            "rope_attention_backward_sm90_keys",
            "rope_attention_backward_sm90_queries",
        ]
        assert all(report["local_bytes"] == 0 for _, report in reports[-2:])


SHORT = [
    AttentionCase("windows", [64, 1, 0, 33, 64], head_dim=64, slack=3),
    AttentionCase("plain", [64, 5, 130, 0, 20], head_dim=80, layout=None),  # 130: three pieces
    AttentionCase("grouped", [60, 30, 0], head_dim=64, kv_heads=1, slack=4),
    AttentionCase("images", [197, 0, 300, 100], head_dim=64),  # 300: two pieces
    AttentionCase("partial", [100, 71], head_dim=72, layout="partial", packed_qkv=True),
    AttentionCase("cross", [70, 3, 0], lengths_k=[0, 300, 9], head_dim=72, heads=2, kv_heads=1, slack=5),
    AttentionCase("images", [150, 20], head_dim=80, heads=1),
    AttentionCase("images", [150, 20, 200], head_dim=96, heads=1),
    AttentionCase("images", [90, 140], head_dim=128, heads=2, kv_heads=1),
]
LONG = AttentionCase("long", [40, 700], head_dim=64, heads=1)


class TestShortSequences:
    """One launch per pass, without a workspace, whatever the lengths turn out to be."""

    pytestmark = emulated

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", SHORT, ids=lambda case: f"{case.name}_{case.head_dim}")
    def test_matches_the_reference(self, case, dtype):
        reports = []
        with launches_on_emulator(reports, capability=90, short=1 << 20, check_uninit_reg=True):
            check_rope_attention(case, dtype, "cuda")
        assert [name.split("_")[2:4] for name, _ in reports] == [["short", "forward"], ["short", "backward"]]
        for _, report in reports:
            assert report["global"]["atomic"]["requests"] == 0

    def test_long_sequences_are_right_too(self):
        with launches_on_emulator(capability=90, short=1 << 20):
            check_rope_attention(LONG, torch.bfloat16, "cuda")

    def test_gradients_do_not_depend_on_the_schedule(self):
        inputs = make_attention_inputs(AttentionCase("seeds", [70, 33, 100], head_dim=64, kv_heads=1), torch.bfloat16)
        tensors = (inputs.q, inputs.k, inputs.v)

        def gradients(seed: int):
            leaves = [x.clone().requires_grad_() for x in tensors]
            with launches_on_emulator(capability=90, short=256, seed=seed, quantum=20 + seed):
                out = rope_attention(*leaves, cu_seqlens=inputs.cu_seqlens, backend="cuda")
                return torch.autograd.grad(out, leaves, inputs.grad_out)

        for one, two in zip(gradients(1), gradients(2)):
            assert torch.equal(one, two)

    @pytest.mark.parametrize(
        ("lengths", "head_dim", "capability", "short"),
        [([256], 64, 90, True), ([200, 320], 64, 90, False), ([20], 88, 90, False), ([20], 128, 80, True)],
    )
    def test_which_calls(self, lengths, head_dim, capability, short):
        """By the average length, and only for the head sizes that are built and devices that have the memory."""
        inputs = make_attention_inputs(AttentionCase("which", lengths, head_dim=head_dim, heads=1), torch.bfloat16)
        reports = []
        with launches_on_emulator(reports, capability=capability, short=256), torch.no_grad():
            rope_attention(inputs.q, inputs.k, inputs.v, cu_seqlens=inputs.cu_seqlens, backend="cuda")
        assert ("short" in reports[0][0]) == short and len(reports) == (1 if short else 2)

    def test_counts(self):
        """No product is computed twice, and nothing is read or written that need not be."""
        case = AttentionCase("counts", [208, 64, 192], head_dim=64)
        inputs = make_attention_inputs(case, torch.bfloat16)
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        reports = []
        with launches_on_emulator(reports, capability=90, short=256):
            out = rope_attention(*leaves, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="cuda", **inputs.kwargs)
            torch.autograd.grad(out, leaves, inputs.grad_out)
        product = 2 * case.head_dim * case.heads * sum(n * n for n in case.lengths)
        (_, forward), (_, backward) = reports
        assert forward["tensor_flops"] == 2 * product
        assert backward["tensor_flops"] <= 5.2 * product  # warps of 32 keys
        tensor, stats = sum(case.lengths) * case.heads * case.head_dim * 2, sum(case.lengths) * case.heads * 8
        tables = 2 * sum(case.lengths) * inputs.cos.shape[-1] * 4
        assert forward["global"]["unique_load_sectors"] * 32 <= 1.01 * (3 * tensor + tables)
        assert forward["global"]["unique_store_sectors"] * 32 <= 1.01 * (tensor + stats)
        assert backward["global"]["unique_load_sectors"] * 32 <= 1.01 * (5 * tensor + tables + stats)
        assert backward["global"]["unique_store_sectors"] * 32 <= 1.01 * 3 * tensor
        for _, report in reports:
            for access in ("ldmatrix", "async_write", "load"):
                assert report["shared"][access]["wavefronts"] == report["shared"][access]["ideal"]


# Lengths, heads and warp instructions of flash-attention 2.8.4's forward (sm_80, bf16, without rotary embedding), counted by
# executing it on the same emulator: docs/kernels/rope_attention_cuda.md.
MIX = AttentionCase("mix", [256, 576, 1024, 729, 400, 1369])
FLASH_ATTENTION = {64: 2_929_540, 72: 4_026_304, 128: 4_306_700}


class TestCounters:
    pytestmark = emulated

    @pytest.mark.parametrize("head_dim", [64, 72, 128])
    def test_forward_on_the_mix(self, head_dim):
        """Rotation included, no more instructions than flash-attention without it (0.8x at 72); no waste, no conflicts."""
        case = dataclasses.replace(MIX, head_dim=head_dim)
        inputs = make_attention_inputs(case, torch.bfloat16)
        reports = []
        with launches_on_emulator(reports, check_race=False), torch.no_grad():
            rope_attention(
                inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="cuda", **inputs.kwargs
            )
        instructions = sum(report["warp_instructions"] for _, report in reports)
        assert instructions <= FLASH_ATTENTION[head_dim] * (0.8 if head_dim == 72 else 1)

        forward = reports[-1][1]
        useful = 4 * head_dim * case.heads * sum(n * n for n in case.lengths)
        assert forward["tensor_flops"] <= 1.02 * useful
        for access in ("ldmatrix", "async_write", "load"):  # all that the main loop does
            assert forward["shared"][access]["wavefronts"] == forward["shared"][access]["ideal"]
        assert forward["local_bytes"] == 0

        tokens, sectors = sum(case.lengths), forward["global"]
        read = 3 * tokens * case.heads * head_dim * 2 + 2 * tokens * inputs.cos.shape[-1] * 4
        written = tokens * case.heads * (head_dim * 2 + 8)
        assert sectors["unique_load_sectors"] * 32 <= 1.01 * read
        assert sectors["unique_store_sectors"] * 32 <= 1.01 * written

    def test_backward_conflicts_and_waste(self):
        case = AttentionCase("backward", [160, 128], head_dim=64)
        inputs = make_attention_inputs(case, torch.bfloat16)
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        reports = []
        with launches_on_emulator(reports):
            out = rope_attention(*leaves, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="cuda", **inputs.kwargs)
            torch.autograd.grad(out, leaves, inputs.grad_out)
        kernels = dict(reports)
        useful = 2 * case.head_dim * case.heads * sum(n * n for n in case.lengths)  # of one product
        for side, products in (("keys", 4), ("queries", 3)):
            report = kernels[f"rope_attention_backward_{side}_bf16_64"]
            assert report["tensor_flops"] == products * useful
            for access in ("ldmatrix", "async_write"):
                assert report["shared"][access]["wavefronts"] == report["shared"][access]["ideal"]
            assert report["global"]["atomic"]["requests"] == 0


# Those with wgmma; what all others spill, test_cuda_resources reads from the library.
BUILT = [(kind, size) for kind in ("forward_sm90", "backward_sm90", "persistent_sm90") for size in (64, 72, 128)]


def compiled(file: str, head_size: int, folder: Path) -> tuple[Path, str]:
    """(the machine code of one file of csrc/rope_attention/cuda, what ptxas says of it)."""
    source = attention_source(file, head_size)
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={source.arch}", "-cubin", "-Xptxas=-v", *INCLUDES, *source.flags]
    command += ["-o", str(folder / "out.cubin"), str(source.path)]
    return folder / "out.cubin", subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.compiles
@pytest.mark.parametrize(("file", "head_size"), BUILT)
@needs_cuda_emulation
def test_machine_code_has_no_spills_and_no_serialised_products(file, head_size, tmp_path):
    _, remarks = compiled(file, head_size, tmp_path)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", remarks)
    assert spills and all(stores == "0" for stores, _ in spills)
    assert "serialized" not in remarks  # ptxas says so where wgmma cannot overlap


@pytest.mark.compiles
@pytest.mark.parametrize("head_size", [64, 72, 80, 96, 128])
@needs_cuda_emulation
def test_kept_rows_keep_their_registers(head_size, tmp_path):
    """ptxas of CUDA 13.0 once gave the registers of operands that are kept over the loop to the packed dS of every step: the
    PTX was right, so the emulator saw nothing, and on an H200 dq was wrong at 64 channels. Kept rows are left operands of
    products that read the other operand as it lies, weights of those that read it transposed (tnspB)."""
    cubin, _ = compiled("backward_sm90", head_size, tmp_path)
    tool = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([str(tool), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = listing.split("Function : ")[1:]
    assert len(kernels) == 4
    for kernel in kernels:
        uses = {False: set(), True: set()}
        for first, rest in re.findall(r"HGMMA\.\S+ R\d+, R(\d+), (gdesc[^;]*)", kernel):
            uses["tnspB" in rest] |= {int(first) + i for i in range(4)}
        assert uses[True] and not uses[False] & uses[True], kernel.split()[0]


class TestHostCode:
    def test_refuses_other_devices(self):
        assert "CUDA device" in cuda.unavailable_reason(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="cuda"):
            rope_attention(*(torch.zeros(4, 2, 64, dtype=torch.bfloat16),) * 3, backend="cuda")

    @pytest.mark.parametrize(
        ("head_dim", "dtype", "word"),
        [(64, torch.bfloat16, None), (10, torch.float32, None), (64, torch.float64, "float64"), (264, torch.float16, "256")],
    )
    def test_declines(self, head_dim, dtype, word):
        q = torch.zeros(4, 2, head_dim, dtype=dtype)
        reason = cuda.declines(Call(q, q, q, None, None, None, None, None, None, head_dim, head_dim // 2, 1.0))
        assert reason is None if word is None else word in reason

    def test_views_are_copied_only_where_16_byte_accesses_need_it(self):
        qkv = torch.zeros(6, 3, 2, 64, dtype=torch.bfloat16)
        assert cuda._aligned(qkv[:, 1]) is not None
        assert cuda._aligned(qkv[:, 1]).data_ptr() == qkv[:, 1].data_ptr()
        odd = torch.zeros(6, 2, 65, dtype=torch.bfloat16)[..., 1:]
        assert cuda._aligned(odd).is_contiguous()
        assert cuda._padded(torch.ones(6, 2, 10)).shape == (6, 2, 16)

    @needs_cuda_emulation
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dtype": 1}, "dtype must be bfloat16, float16 or float32"),
            ({"head_dim": 12}, "head_dim must be a multiple of 8"),
            ({"k_stride_token": 12}, "k must start at a multiple of 16 bytes"),
            ({"num_tokens": 2**31}, "at most"),
        ],
    )
    def test_the_library_checks_what_it_relies_on(self, change, message):
        fields = dict(dtype=2, head_dim=64, num_heads=2, num_heads_k=2) | change
        forward = _native.cuda().comp_kernels_cuda_rope_attention_forward
        forward.argtypes, forward.restype = [ctypes.POINTER(native.Params), ctypes.c_void_p, ctypes.c_void_p], ctypes.c_char_p
        with pytest.raises(RuntimeError, match=message):
            _native.call(forward, native.Params(**fields), None, None)

    @needs_cuda_emulation
    def test_workspace(self):
        """Tiles of 128 queries for any cu_seqlens, and the turned keys."""
        size = _native.cuda().comp_kernels_cuda_rope_attention_workspace
        size.argtypes, size.restype = [ctypes.POINTER(native.Params), ctypes.c_int32], ctypes.c_int64
        params = native.Params(
            dtype=2, head_dim=64, num_heads=4, num_heads_k=2, num_tokens=1000, num_tokens_k=500, num_sequences=3
        )
        tiles = (1000 // 128 + 3 + 1) * 16
        assert size(ctypes.byref(params), 0) == -(-tiles // 256) * 256
        params.cos_k = 1  # any address: only whether there is one counts
        assert size(ctypes.byref(params), 0) == -(-tiles // 256) * 256 + 500 * 2 * 64 * 2
