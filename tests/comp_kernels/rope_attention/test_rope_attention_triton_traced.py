"""The Triton rope_attention under torch.compile and fake tensors: one node, whose shapes are known without running it.

Kernels run in the interpreter here. What only a GPU can show: that inductor's own kernels around the node agree with it.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import comp_kernels as ck
from comp_kernels.ops.rope_attention.registration import BACKWARD, FORWARD
from comp_kernels.testing import AttentionCase, make_attention_inputs

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_opcheck():
    inputs = make_attention_inputs(AttentionCase("packed", [3, 5], heads=4, kv_heads=2, head_dim=24), device=DEVICE)
    tables = (inputs.cos, inputs.sin, inputs.cos, inputs.sin)
    bounds = (inputs.cu_seqlens, inputs.cu_seqlens)
    settings = (inputs.kwargs["rotary_dim"], inputs.kwargs["pair_stride"], 0.25, "triton", False)
    arguments = (inputs.q, inputs.k, inputs.v, *tables, *bounds, *settings)
    out, lse = FORWARD(*arguments)
    for table_grads in (False, True):
        cotangents = (inputs.grad_out, inputs.grad_lse)
        torch.library.opcheck(BACKWARD, (*cotangents, *arguments[:3], out, lse, *arguments[3:], table_grads))
    for x in inputs.leaves().values():
        x.requires_grad_()
    torch.library.opcheck(FORWARD, arguments)


def test_one_compiled_graph_for_any_lengths():
    """Forward and backward compiled without a break, equal bit for bit to eager, and not compiled again for other lengths."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k, v, cos, sin, cu_seqlens):
        return ck.rope_attention(q * 2, k, v, cos, sin, cu_seqlens, backend="triton").square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([9, 0, 4], [70]):  # keys turned in the loop, and in a workspace (more than 64 tokens on average)
        inputs = make_attention_inputs(AttentionCase("any", lengths, heads=2), device=DEVICE)
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.cos)]
        arguments = (*leaves, inputs.sin, inputs.cu_seqlens)
        expected = torch.autograd.grad(step(*arguments), leaves)
        for actual, gradient in zip(torch.autograd.grad(compiled(*arguments), leaves), expected):
            assert torch.equal(actual, gradient)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_traced_for_a_gpu_that_is_not_there(dtype):
    """Fake tensors on "cuda": backend=None takes Triton, and the graph holds one operator and no copy of q, k, v.

    The backward operator is called by itself: the autograd engine wants a real device.
    """
    tokens, heads, kv_heads, head_dim = 50, 4, 2, 72

    def forward(q, k, v, cos, sin, cu_seqlens):
        return ck.rope_attention(q, k, v, cos, sin, cu_seqlens, return_lse=True)

    with FakeTensorMode(allow_non_fake_inputs=True):
        qkv = torch.empty(tokens, heads + 2 * kv_heads, head_dim, device="cuda", dtype=dtype)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)  # views of a fused projection
        cos, sin = torch.empty(2, tokens, head_dim // 2, device="cuda")
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        graph = make_fx(forward)(q, k, v, cos, sin, cu_seqlens)
        out, lse = forward(q, k, v, cos, sin, cu_seqlens)
        settings = (cos, sin, cos, sin, cu_seqlens, cu_seqlens, head_dim, head_dim // 2, 0.1, "triton", True, False)
        dq, dk, dv, *table_gradients = BACKWARD.default(torch.empty_like(out), None, q, k, v, out, lse, *settings)
    assert {x.device.type for x in (out, lse, dq, dk, dv)} == {"cuda"}
    assert out.shape == dq.shape == (tokens, heads, head_dim) and out.dtype == dq.dtype == dk.dtype == dtype
    assert dk.shape == dv.shape == (tokens, kv_heads, head_dim)
    assert lse.shape == (heads, tokens) and lse.dtype == torch.float32
    assert all(gradient.numel() == 0 for gradient in table_gradients)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    own = [node for node in calls if "comp_kernels" in str(node.target)]
    assert [node.target for node in own] == [FORWARD.default]
    assert "triton" in own[0].args
    assert not any(name in str(node.target) for node in calls for name in ("clone", "contiguous"))
