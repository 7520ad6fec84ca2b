"""How often Triton compiles: as many kernels as the operators have, however many sizes come by, and wide loads for all of them.

Counted by Triton's own keys (comp_kernels/_triton_compile.py); nothing runs, and only the last test compiles.
"""

import random

import pytest
import torch
from emulation import run_compiled
from kernel_names import ATTENTION

import comp_kernels as ck
from comp_kernels._triton_compile import compile_launch, record, specialization
from comp_kernels.testing import AttentionCase, make_attention_inputs

pytestmark = pytest.mark.compiles


def lengths_of_a_batch(rng: random.Random, shortest: int, longest: int) -> list[int]:
    return [rng.randint(shortest, longest) for _ in range(rng.choice((1, 2, 3, 5, 16, 17, 33)))]


def attention_call(lengths, layout="half_hwhw_halfwidth", heads_first=False, table_grads=False, **sizes):
    """Forward and backward of one packed batch; heads_first: q, k, v are views of [H, T, D], whose head strides hold T."""
    inputs = make_attention_inputs(AttentionCase("batch", lengths, head_dim=72, layout=layout, **sizes), torch.bfloat16)
    q, k, v = inputs.q, inputs.k, inputs.v
    if heads_first:
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    bounds = torch.cat((inputs.cu_seqlens[:1], inputs.cu_seqlens))[1:]  # a view that begins anywhere
    leaves = [x.requires_grad_() for x in (q, k, v, *([inputs.cos] if table_grads else []))]

    def call():
        out = ck.rope_attention(q, k, v, inputs.cos, inputs.sin, bounds, backend="triton", **inputs.kwargs)
        torch.autograd.grad(out, leaves, inputs.grad_out)

    return call


def attention_keys(arch, seed, batches, shortest, longest, **options) -> list[set]:
    """The keys of each of some random batches."""
    rng, found = random.Random(seed), []
    for _ in range(batches):
        call = attention_call(lengths_of_a_batch(rng, shortest, longest), **options)
        found.append({specialization(launch, arch) for launch in record(call, arch)})
    return found


@pytest.mark.parametrize("arch", ("sm_90", "sm_120", "gfx942"))
def test_attention_of_any_lengths(arch):
    """60 batches: five kernels, of which AMD adds one; the same five from the first batch to the last."""
    first, *others = run_compiled(attention_keys, arch, 0, 60, 65, 300)
    assert {name for name, _ in first} == ATTENTION | ({"unrotate_kernel"} if arch == "gfx942" else set())
    assert len(first) == 5 + (arch == "gfx942")
    assert all(keys == first for keys in others)


@pytest.mark.parametrize(
    "options",
    (
        dict(heads_first=True),
        dict(packed_qkv=True, kv_heads=1),
        dict(layout="per_head_interleaved", table_grads=True),
        dict(layout=None),
    ),
    ids=str,
)
def test_attention_of_any_arrangement(options):
    first, *others = run_compiled(attention_keys, "sm_80", 1, 12, 65, 200, **options)
    assert all(keys == first for keys in others)


def test_short_and_long_sequences_share_all_but_the_forward_kernel():
    """Windows turn their keys in the loop: one more forward kernel, whichever batch comes, and nothing else."""
    long, *_ = run_compiled(attention_keys, "sm_90", 2, 1, 65, 300)
    every = set().union(*run_compiled(attention_keys, "sm_90", 3, 60, 0, 128))
    assert long < every
    assert [name for name, _ in every - long] == ["attention_forward_kernel"]


def alignment_keys(num_words, words_dtype, seed, batches, **settings) -> list[set]:
    """Features in float32. Prototypes in float16 are widened tile by tile; in bfloat16 they meet features of three terms."""
    rng, dim, found = random.Random(seed), 24, []
    prototypes, prior = torch.zeros(num_words, dim, dtype=words_dtype), torch.ones(num_words)
    for _ in range(batches):
        rows = rng.choice((1, 16, 31, rng.randint(1, 3000)))
        vision, text = torch.zeros(rows, dim, requires_grad=True), torch.zeros(rows, dim)

        def call(vision=vision, text=text):
            loss = ck.alignment_loss(vision, text, prototypes, prior=prior, backend="triton", **settings)
            torch.autograd.grad(loss, vision)

        found.append({specialization(launch, "sm_90") for launch in record(call, "sm_90")})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode, kernels", [("sinkhorn", 10), ("literal", 9), ("softmax", 8)])
def test_alignment_loss_of_any_batch(mode, kernels, dtype):
    """30 batches of 1 to 3000 rows, in up to three tiles of the vocabulary."""
    first, *others = run_compiled(alignment_keys, 49152 + 16, dtype, 0, 30, mode=mode)
    assert len(first) == kernels
    assert all(keys == first for keys in others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alignment_loss_over_an_odd_vocabulary(dtype):
    """Its last tile has columns that no power of two divides: five kernels have a second form, whatever the rows."""
    found = run_compiled(alignment_keys, 40001, dtype, 1, 30)
    assert len(set().union(*found)) == 10 + 5


def sinkhorn_keys(seed, batches, tol, shortest, longest, cols=1000) -> list[set]:
    rng, found = random.Random(seed), []
    for _ in range(batches):
        scores = torch.zeros(*rng.choice(((), (1,), (3,), (16,))), rng.randint(shortest, longest), cols)

        def call(scores=scores):
            ck.sinkhorn(scores, epsilon=0.1, num_iters=3, tol=tol, backend="triton")

        found.append({specialization(launch, "sm_90") for launch in record(call, "sm_90")})
    return found


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_sinkhorn_of_any_batch(tol):
    """30 batches of 33 rows and more, the first iteration as all others."""
    first, *others = run_compiled(sinkhorn_keys, 0, 30, tol, 33, 1500)
    assert len(first) == 3
    assert all(keys == first for keys in others)


def test_sinkhorn_of_few_rows():
    """Three heights of tiles, of 16, 32 and 64 rows: two kernels of three depend on them."""
    assert len(set().union(*run_compiled(sinkhorn_keys, 1, 30, None, 1, 100))) == 3 * 2 + 1


def memory_instructions(arch: str) -> dict[str, set[str]]:
    """Kernel -> opcodes that read and write global memory, compiled for sizes that 2 does not divide."""
    from benchmarks.compile_report import disassemble

    def sinkhorn():
        ck.sinkhorn(torch.zeros(3, 65, 1000), epsilon=0.1, num_iters=1, backend="triton")

    launches = record(attention_call([65, 66, 100]), arch) + record(sinkhorn, arch)
    codes = {launch.name: disassemble(compile_launch(launch, arch).asm["cubin"]) for launch in launches}
    return {name: {opcode for _, opcode, _ in code if opcode.startswith(("LDG", "STG"))} for name, code in codes.items()}


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_wide_loads_of_any_sizes(arch):
    """16 bytes at a time: rows of q, k and v on their way to shared memory, rows of scores, pairs of row sums, results."""
    found = run_compiled(memory_instructions, arch)
    for name in ("attention_forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"):
        assert {"LDGSTS.E.BYPASS.128", "STG.E.128"} <= found[name], (name, found[name])
    for name in ("rotate_kernel", "row_terms_kernel", "column_step_kernel", "merge_rows_kernel", "plan_kernel"):
        assert "LDG.E.128" in found[name], (name, found[name])
    assert "STG.E.128" in found["plan_kernel"]
