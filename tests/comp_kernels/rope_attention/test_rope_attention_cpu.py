"""rope_attention in C++ on the CPU: error budgets over all cases, gradients, reproducibility, instruction sets, refusals."""

import dataclasses
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import comp_kernels as ck
from comp_kernels import _native, testing
from comp_kernels.ops.rope_attention import cpu, reference
from comp_kernels.ops.rope_attention.call import Call
from comp_kernels.testing import (
    ATTENTION_CASES,
    LAYOUTS,
    AttentionCase,
    attention_with_gradients,
    check_huge_logits,
    check_median_error,
    check_rope_attention,
    make_attention_inputs,
)

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
INSTRUCTION_SETS = {"baseline": "", "avx2": "avx2", "avx512": "avx512vl"}
INSTRUCTION_SETS |= {"avx512_bf16": "avx512_bf16", "amx": "amx_bf16", "amx_bf16x3": "amx_bf16", "amx_fp16": "amx_fp16"}
"""With the processor's flag that tells; each contains those before it."""


def test_the_library_is_built():
    """Everything below runs on it: a missing compiler must show as one clear failure, not as skipped tests."""
    assert _native.cpu_unavailable_reason() is None
    assert "cpu" in ck.available_backends("rope_attention", "cpu")


def run(inputs, backend="cpu"):
    def function(*args, **kwargs):
        return ck.rope_attention(*args, return_lse=True, backend=backend, **kwargs)

    return attention_with_gradients(inputs, function)


@pytest.mark.parametrize("name", [name for name in ATTENTION_CASES if name != "logits_of_1e4"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_error_budget(name, dtype):
    check_rope_attention(ATTENTION_CASES[name], dtype, "cpu")


def test_error_budget_sees_a_small_systematic_error(monkeypatch):
    """More draws make room for bad luck, not for an error that is there in every draw."""

    def slightly_wrong(q, k, *args, **kwargs):
        return ck.rope_attention(q, k * (1 + 2e-6), *args, **kwargs)

    monkeypatch.setattr(testing, "rope_attention", slightly_wrong)
    with pytest.raises(AssertionError, match="of 16 draws exceeds the budget"):
        check_rope_attention(ATTENTION_CASES["no_keys_first"], torch.float32, "cpu")


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_error_budget_of_large_logits(dtype):
    case = dataclasses.replace(ATTENTION_CASES["logits_of_1e4"], lengths=[160, 9], heads=4)
    check_median_error(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_huge_logits_stay_finite(dtype):
    check_huge_logits(dtype, "cpu")
    if dtype != torch.float16:
        check_huge_logits(dtype, "cpu", magnitude=1e12)


@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_float64(name):
    """Two float64 computations, neither the truth of the other: they differ by roundings of the logits, up to 1e4 here."""
    inputs = make_attention_inputs(ATTENTION_CASES[name], torch.float64)
    exact = run(inputs, backend="reference")
    for key, value in run(inputs).items():
        finite = exact[key].isfinite()
        assert torch.equal(value[~finite], exact[key][~finite]), key
        scale = exact[key][finite].abs().max() if finite.any() else 1.0
        assert ((value - exact[key])[finite].abs() <= 1e-11 * max(1.0, scale)).all(), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    case = AttentionCase("small", [3, 0, 2], lengths_k=[2, 1, 9], layout=layout, head_dim=12, heads=2, kv_heads=1)
    inputs = make_attention_inputs(case, torch.float64)
    leaves = [x.requires_grad_() for x in inputs.leaves().values()]
    kwargs = {key: x for key, x in inputs.kwargs.items() if key not in ("cos_k", "sin_k")}

    def function(q, k, v, cos, sin, cos_k, sin_k):
        out, lse = ck.rope_attention(
            q, k, v, cos, sin, inputs.cu_seqlens, cos_k=cos_k, sin_k=sin_k, return_lse=True, backend="cpu", **kwargs
        )
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("awkward", "dim_72", "gqa", "cross"))
def test_same_bits_again_and_with_two_threads(name, dtype):
    """Also for one long sequence, which two threads share by cutting queries and keys apart."""
    threads = torch.get_num_threads()
    try:
        for case in (ATTENTION_CASES[name], AttentionCase("long", [700], heads=1, head_dim=24)):
            inputs = make_attention_inputs(case, dtype)
            torch.set_num_threads(1)
            once, again = run(inputs), run(inputs)
            torch.set_num_threads(2)
            shared = run(inputs)
            for key, value in once.items():
                assert torch.equal(value, again[key]) and torch.equal(value, shared[key]), key
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_threads_share_no_scratch():
    """The memory kept between calls belongs to one of them at a time; calls of different sizes take turns."""
    cases = [make_attention_inputs(AttentionCase("threads", [n], heads=2, head_dim=24, seed=n)) for n in (40, 300, 129, 500)]
    expected = [run(inputs) for inputs in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for once, again in zip(expected, pool.map(run, cases)):
                assert all(torch.equal(value, again[key]) for key, value in once.items())


def test_no_keys_before_keys_in_one_thread():
    """One thread takes its work unsorted: an item without keys comes first and must not pass for the one packed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check_rope_attention(ATTENTION_CASES["no_keys_first"], torch.float32, "cpu")
    finally:
        torch.set_num_threads(threads)


def test_many_blocks_of_queries_and_keys():
    """Lengths around and beyond the block sizes of both passes (96 x 192 and 96 x 96); 143 is the longest that is one block, in
    every instruction set."""
    case = AttentionCase("blocks", [95, 97, 128, 129, 143, 333, 700], heads=1, head_dim=72, seed=3)
    for dtype in LOW_PRECISION:
        check_rope_attention(case, dtype, "cpu")


@pytest.mark.parametrize("head_dim", (6, 20, 40, 56, 74, 104, 136))
def test_products_of_every_width(head_dim):
    """Products are cut into panels of one to five vectors by the number of keys and of channels; an odd number of half vectors
    of channels is multiplied in halves, two keys at a time, so lengths are odd and even."""
    lengths = [n + (n // 16) % 2 for n in range(1, 300, 16)]
    case = AttentionCase("widths", lengths, heads=1, head_dim=head_dim, layout=None, seed=11)
    check_rope_attention(case, torch.float32, "cpu")
    inputs = make_attention_inputs(case, torch.float64)
    exact = run(inputs, backend="reference")
    for key, value in run(inputs).items():
        torch.testing.assert_close(value, exact[key], rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("scale", (0.0, -0.3))
def test_scale_of_any_sign(scale):
    inputs = make_attention_inputs(AttentionCase("scale", [40, 150], scale=scale), torch.float64)
    exact = run(inputs, backend="reference")
    for key, value in run(inputs).items():
        torch.testing.assert_close(value, exact[key], rtol=1e-9, atol=1e-11, msg=key)


def test_scales_in_bfloat16():
    check_rope_attention(AttentionCase("scale", [40, 150], scale=-0.3), torch.bfloat16, "cpu")
    inputs = make_attention_inputs(AttentionCase("scale", [41], scale=0.0), torch.bfloat16)
    mean = inputs.v.double().mean(0)  # with weights that are all one, the only rounding is that of the result
    assert ((run(inputs)["out"].double() - mean).abs() <= 2**-8 * mean.abs()).all()


def test_growing_logits_rescale_what_was_summed():
    """The largest score comes in the last block, after blocks that carried all the weight so far."""
    keys = torch.linspace(0, 60, 500, dtype=torch.float64)[:, None, None].expand(500, 1, 16)
    q, v = torch.randn(5, 1, 16, dtype=torch.float64), torch.randn(500, 1, 16, dtype=torch.float64)
    bounds = [torch.tensor([0, n]) for n in (5, 500)]
    for direction in (keys, keys.flip(0)):
        args = (q, direction.float(), v)
        out = ck.rope_attention(*(x.float() for x in args), cu_seqlens=bounds[0], cu_seqlens_k=bounds[1], backend="cpu")
        exact = reference.rope_attention(*(x.double() for x in args), cu_seqlens=bounds[0], cu_seqlens_k=bounds[1])
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", (0.01, 0.1))
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_small_logits(dtype, magnitude):
    """All weights are nearly 1, and lse of plain PyTorch is far more precise than a 16-bit dtype."""
    for layout in ("half_hwhw", None):
        check_rope_attention(AttentionCase("small", [200, 31], head_dim=64, layout=layout, magnitude=magnitude), dtype, "cpu")


LEVELS = {
    "a_little": {70: 12.0},  # beyond 2^8 times the weights before, not beyond 2^32
    "in_the_first_block": {70: 40.0},
    "in_the_second_block": {300: 40.0},
    "step_by_step": {40: 3.0, 130: 15.0, 200: 60.0, 330: 20.0, 420: 120.0, 500: 110.0},
    "falling": {0: 100.0, 70: 50.0, 300: 0.0},
    "far_from_zero": {0: 4000.0, 300: 4020.0},
    "far_below_zero": {0: -4000.0, 300: -3000.0},
}
"""Nats that are added to the scores of all keys from one on: {key: nats}."""


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_scores_that_grow_from_key_to_key(dtype, levels):
    """What weights are measured against is the largest score, of the first keys only while later ones are not far above it.
    Of two heads one has such keys."""

    def change(inputs):
        inputs.q[:, 0, 0] = 8.0
        for key, nats in LEVELS[levels].items():
            inputs.k[key:, 0, 0] = nats / 8.0 / inputs.kwargs["scale"]

    check_rope_attention(AttentionCase("grow", [600], head_dim=64, layout=None, scale=0.125), dtype, "cpu", change=change)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_huge_logits_of_one_query(dtype):
    """A rounding of scores of 1e10 is hundreds of bits; no other query's roundings then decide how a block is computed."""
    q, k, v = torch.randn(3, 40, 100, 1, 64, generator=torch.Generator().manual_seed(0))
    q, k = ((2e4 * x).clamp(-6e4, 6e4).to(dtype) for x in (q, k))
    scores = torch.einsum("bd,bkd->bk", q[:, 0, 0].double(), k[:, :, 0].double())
    best = scores.topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-4 * best.values[:, 0].abs()
    assert clear.sum() > 30
    for n in clear.nonzero()[:, 0].tolist():
        out = ck.rope_attention(q[n, :1], k[n], v[n].to(dtype), scale=1.0, backend="cpu")
        assert torch.equal(out[0], v[n, best.indices[n, 0]].to(dtype))


@pytest.mark.parametrize("key", (10, 100, 299))
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_nan_in_a_late_key(dtype, key):
    inputs = make_attention_inputs(AttentionCase("nan", [300], heads=2), dtype)
    clean = run(inputs)["out"]
    inputs.k[key, 0, 3] = torch.nan
    out = run(inputs)["out"]
    assert out[:, 0].isnan().all()
    assert torch.equal(out[:, 1], clean[:, 1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_nan_in_one_sequence_stays_there(dtype):
    inputs = make_attention_inputs(AttentionCase("nan", [70, 130, 9]), dtype)
    clean = run(inputs)["out"]
    inputs.k[75, 0, 3] = torch.nan
    out = run(inputs)["out"]
    assert out[70:200, 0].isnan().all()
    assert torch.equal(out[:70], clean[:70]) and torch.equal(out[200:], clean[200:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_any_stride(dtype):
    """Token and head strides as a transposed [H, T, D] leaves them; a last dimension that is not contiguous; expanded grads."""
    inputs = make_attention_inputs(AttentionCase("strides", [30, 41], heads=3), dtype)
    expected = ck.rope_attention(inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="cpu")
    q = inputs.q.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    k = inputs.k.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    out = ck.rope_attention(q, k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens.long(), backend="cpu")
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_defaults_without_cu_seqlens():
    q, k, v = torch.randn(3, 20, 2, 16)
    expected = reference.rope_attention(q, k, v)
    torch.testing.assert_close(ck.rope_attention(q, k, v, backend="cpu"), expected)
    torch.testing.assert_close(ck.rope_attention(q[:7], k, v, backend="cpu"), expected[:7])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_instruction_sets(isa):
    """Every variant this processor can run gives the reference's answer; each needs a fresh process. Where it is not there, the
    best of those below serves."""
    program = (
        "import math, torch, comp_kernels; from comp_kernels import _native; from comp_kernels.testing import *\n"
        "for name in ('awkward', 'dim_72', 'dim_10', 'layout_interleaved', 'gqa'):\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "        check_rope_attention(ATTENTION_CASES[name], dtype, 'cpu')\n"
        # Weights below normal numbers, which some processors take eighty times as long to multiply with, are zero; just above
        # they may be off by 2^-126. The thread keeps such numbers elsewhere.
        "q, k, v = torch.ones(1, 1, 8), torch.zeros(17, 1, 8), torch.zeros(17, 1, 8)\n"
        "for nats, weight, rtol in ((69, math.exp(-69), 1e-5), (87, math.exp(-87), 0.05), (89, 0, 0), (1e4, 0, 0)):\n"
        "    k[1:], v[1:] = -nats / 8, 1e38\n"
        "    out = comp_kernels.rope_attention(q, k, v, scale=1.0, backend='cpu')\n"
        "    torch.testing.assert_close(out, torch.full_like(out, 16 * 1e38 * weight), rtol=rtol, atol=0)\n"
        "    assert torch.tensor(1e-20) * 1e-20 > 0\n"
        "print(_native.cpu().comp_kernels_cpu_isa().decode())"
    )
    environment = {**os.environ, "COMP_KERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    taken, cpuinfo = result.stdout.split()[0], Path("/proc/cpuinfo")
    assert taken != isa or "attention" not in result.stdout  # a set that is named serves everything
    if taken != isa and cpuinfo.exists():
        assert INSTRUCTION_SETS[isa] not in cpuinfo.read_text().split()
    order = list(INSTRUCTION_SETS)
    assert order.index(taken) <= order.index(isa)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="what the processor is stands in /proc/cpuinfo, which Linux has")
def test_zen_4_multiplies_floats_in_avx2():
    """AMD's family 25 with AVX-512, which executes it in halves, unless a set is named."""
    environment = {key: value for key, value in os.environ.items() if key != "COMP_KERNELS_CPU_ISA"}
    program = "from comp_kernels import _native; print(_native.cpu().comp_kernels_cpu_isa().decode())"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    cpuinfo = dict(re.findall(r"^(vendor_id|cpu family|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    in_halves = cpuinfo.get("vendor_id") == "AuthenticAMD" and cpuinfo["cpu family"] == "25" and "avx512vl" in cpuinfo["flags"]
    assert ("avx2)" in result.stdout) == in_halves


def test_a_set_that_does_not_exist_is_refused(monkeypatch):
    _native._cpu.cache_clear()
    monkeypatch.setenv("COMP_KERNELS_CPU_ISA", "avx-512")
    with pytest.raises(ValueError, match=r"must be one of baseline, avx2, avx512, .* got 'avx-512'"):
        _native.cpu()
    monkeypatch.undo()
    _native.cpu()


def test_refusals():
    q = torch.randn(4, 2, 258)
    with pytest.raises(RuntimeError, match="at most 256, got 258"):
        ck.rope_attention(q, q, q, backend="cpu")
    assert ck.rope_attention(q, q, q).shape == q.shape  # nobody named a backend: the reference serves
    q = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        ck.rope_attention(q, q, q, cu_seqlens=torch.tensor([0, 5]), backend="cpu")
    bounds = torch.tensor([0, 9], dtype=torch.int32)  # past the checks of the public function, as in a compiled graph
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, never decrease and end at or below the 4 tokens"):
        cpu.forward(Call(q, q, q, None, None, None, None, bounds, bounds, rotary_dim=16, pair_stride=8, scale=1.0))
    bounds, wide = bounds // 9 * 4, torch.ones(4, 16)
    with pytest.raises(RuntimeError, match="table_width must be rotary_dim = 8 or half of it, got 16"):
        cpu.forward(Call(q, q, q, wide, wide, wide, wide, bounds, bounds, rotary_dim=8, pair_stride=4, scale=1.0))


def test_any_number_of_empty_sequences():
    """Each took 48 bytes per head: 200 GB here."""
    q, bounds = torch.randn(1, 4096, 2), torch.zeros(2**20 + 1, dtype=torch.int32)
    bounds[-1] = 1
    assert torch.equal(ck.rope_attention(q, q, q, cu_seqlens=bounds, backend="cpu"), q)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_want_of_memory_is_an_error():
    """And not the end of the process, as of an exception that leaves the library. The limit needs a process of its own."""
    code = """
import resource, torch, comp_kernels as ck
q, bounds = torch.zeros(1, 1, 2).expand(2**16, 256, 2), torch.arange(2**16 + 1, dtype=torch.int32)
ck.rope_attention(q[:2], q[:2], q[:2], backend="cpu")
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (600 << 20), -1))  # 268 MB of results, 800 of items
try:
    ck.rope_attention(q, q, q, cu_seqlens=bounds, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "out of memory"), done.stderr


@pytest.mark.parametrize("magnitude", (1e3, 1e6, 1e18, 1e30))
def test_gradients_of_huge_logits(magnitude):
    """Weights recomputed in the backward pass are those of the forward pass, however large the logits."""

    def scale_queries(inputs):
        inputs.q = inputs.q * magnitude

    check_median_error(AttentionCase("huge", [20, 9], layout=None), torch.float32, "cpu", change=scale_queries)


@pytest.mark.parametrize("dtype", (*LOW_PRECISION, torch.float64), ids=str)
@pytest.mark.parametrize("head_dim", (16, 72, 88, 128))
def test_scores_learn_nothing_where_one_key_has_all_the_weight(dtype, head_dim):
    """dP minus delta is zero there in exact numbers. What rounding leaves of it is multiplied with q and k: 1e-7 with 1e18."""
    torch.manual_seed(0)
    q, k = torch.zeros(2, 109, 2, head_dim, dtype=dtype)
    q[..., 0] = 6e4 if dtype == torch.float16 else 1e18
    k[[7, 103], :, 0] = 1  # one key of each sequence
    v, grad_out = torch.randn(2, 109, 2, head_dim).to(dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = ck.rope_attention(q, k, v, cu_seqlens=torch.tensor([0, 100, 109]), backend="cpu")
    dq, dk = torch.autograd.grad(out, (q, k), grad_out)
    assert dq.count_nonzero() == dk.count_nonzero() == 0
