"""rope_attention on the CPU against what a user could pick instead, forward and forward with backward."""

import copy

import pytest
import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

import comp_kernels as ck
from comp_kernels.testing import AttentionCase, make_attention_inputs

from .attention_cases import CASES, inputs_of, largest_error, operations
from .attention_peers import peers_of
from .measure import compare

DTYPES = {torch.float32: "", torch.bfloat16: " bf16", torch.float16: " fp16"}
"""And what they add to the names of groups."""


def training_step(attention, inputs):
    """Forward and backward of `attention(q, k, v)` with a fixed cotangent."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, inputs.grad_out)


def inference(attention, inputs):
    def run():
        with torch.no_grad():
            return attention(inputs.q, inputs.k, inputs.v)

    return run


def rope_attention_of(inputs):
    return lambda q, k, v: ck.rope_attention(q, k, v, inputs.cos, inputs.sin, inputs.cu_seqlens, **inputs.kwargs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", ("forward", "forward+backward"))
@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16", "float16"))
def test_attention(benchmark, dtype, which, name):
    case = CASES[name]
    inputs = inputs_of(case, dtype)
    training = which == "forward+backward"
    calls = {"ours": rope_attention_of(inputs), **peers_of(case, inputs, training=training)}
    calls = {key: (training_step if training else inference)(call, inputs) for key, call in calls.items()}

    def ours(*args):
        return ck.rope_attention(*args, **inputs.kwargs)

    compare(
        benchmark,
        calls.pop("ours"),
        calls,
        group=which + DTYPES[dtype],
        case=name,
        operations=operations(case) * (3.5 if training else 1),
        error=largest_error(ours, inputs),
        rounds=3 if name == "one_long_image" else 7,
        dtype=dtype,
    )


@pytest.mark.parametrize("tokens", (4, 64))
@pytest.mark.parametrize("which", ("forward", "forward+backward"))
def test_small_calls(benchmark, which, tokens):
    """What a call costs where there is next to nothing to compute: 200 calls on one sequence of 4 heads of 32 channels, beside
    torch's attention without rotation on tensors in its own layout."""
    inputs = make_attention_inputs(AttentionCase("small", [tokens], heads=4, head_dim=32))
    in_their_layout = copy.copy(inputs)
    for name in ("q", "k", "v", "grad_out"):
        setattr(in_their_layout, name, getattr(inputs, name).transpose(0, 1)[None].contiguous())
    attention_of = training_step if which == "forward+backward" else inference

    def repeated(call):
        def run():
            for _ in range(200):
                call()

        return run

    compare(
        benchmark,
        repeated(attention_of(rope_attention_of(inputs), inputs)),
        {"sdpa": repeated(attention_of(torch.nn.functional.scaled_dot_product_attention, in_their_layout))},
        group=f"200 small calls, {which}",
        case=f"{tokens} tokens",
        rounds=25,
    )


class FusedVisionAttention(VisionAttention):
    """transformers' Qwen2-VL attention with our operator between its projections."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out = ck.rope_attention(q, k, v, *position_embeddings, cu_seqlens)
        return self.proj(out.flatten(1))


@pytest.mark.parametrize("name", ("qwen25vl_windows", "native_mix"))
def test_qwen2_vl_attention_module(benchmark, name):
    """The whole attention module, projections included, forward and backward."""
    case = CASES[name]
    inputs = inputs_of(case)
    width = case.heads * case.head_dim
    config = Qwen2VLVisionConfig(embed_dim=width, num_heads=case.heads)
    config._attn_implementation = "sdpa"
    theirs, ours = VisionAttention(config), FusedVisionAttention(config)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(sum(case.lengths), width, requires_grad=True)

    def step(module):
        out = module(hidden, cu_seqlens=inputs.cu_seqlens, position_embeddings=(inputs.cos, inputs.sin))
        return torch.autograd.grad(out, [hidden, *module.parameters()], torch.ones_like(out))

    torch.testing.assert_close(
        ours(hidden, inputs.cu_seqlens, (inputs.cos, inputs.sin)),
        theirs(hidden, inputs.cu_seqlens, (inputs.cos, inputs.sin)),
        rtol=1e-4,
        atol=1e-4,
    )
    compare(
        benchmark,
        lambda: step(ours),
        {"transformers": lambda: step(theirs)},
        group="Qwen2-VL attention module",
        case=name,
        operations=operations(case) * 3.5 + 3 * 8 * sum(case.lengths) * width**2,
    )
