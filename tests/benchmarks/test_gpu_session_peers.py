"""benchmarks/gpu_session/peers.py, as far as it goes without a GPU: every peer's call against the definition.

Peers that need CUDA are replaced by functions with the signature of the real one, as documented (flash-attention 2.8.4 and its
hopper interface at 0251105a, xformers before it moved to mslk) or, for torch, as installed. So a wrong order of arguments, a
wrong layout of q, k, v or a wrong table fails here; whether the real kernels accept the sizes only a GPU can show.
"""

import inspect
import sys
import types

import pytest
import torch

import comp_kernels as ck
from benchmarks.gpu_session import peers, workloads
from comp_kernels.testing import cumulative

WORKLOAD = workloads.Workload("small", (5, 9, 1), 2, 16)


@pytest.fixture(autouse=True)
def nothing_compiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def packed_attention(q, k, v, cu_seqlens):
    return ck.reference.rope_attention(q, k, v, cu_seqlens=cu_seqlens)


def assert_is_our_definition(peer):
    x = workloads.make_inputs(WORKLOAD, "cpu", torch.float32)
    expected = ck.reference.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens)
    attend = peers.PEERS[peer][1]()
    torch.testing.assert_close(attend(x), expected)
    torch.testing.assert_close(attend(x), expected)  # with what it prepared in the first call


def module(monkeypatch, name, **members):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))


@pytest.mark.parametrize("peer", ("flex", "nested jagged", "SDPA per image"))
def test_peers_that_run_on_the_cpu(peer):
    assert_is_our_definition(peer)


def test_call_of_flash_attn(monkeypatch):
    def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
        """x [batch, positions, heads, D], tables [positions, D / 2]."""
        assert x.shape[0] == 1 and not interleaved and cu_seqlens is None and cos.shape == (x.shape[1], x.shape[3] // 2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos[:, None] - b * sin[:, None], a * sin[:, None] + b * cos[:, None]), dim=-1)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == 9 and dropout_p == 0.0 and not causal and cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        return packed_attention(q, k, v, cu_seqlens_q)

    module(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    module(monkeypatch, "flash_attn.layers")
    module(monkeypatch, "flash_attn.layers.rotary", apply_rotary_emb=apply_rotary_emb)
    assert_is_our_definition("flash-attn")


@pytest.mark.parametrize("returns_lse", (False, True))
def test_call_of_flash_attn_3(monkeypatch, returns_lse):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
        causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == 9 and seqused_q is seqused_k is None and not causal
        out = packed_attention(q, k, v, cu_seqlens_q)
        return (out, None) if returns_lse else out

    module(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func)
    assert_is_our_definition("flash-attn 3")


def test_call_of_torch_varlen(monkeypatch):
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)  # positional names differ in no torch from 2.10 on; later ones may

    def varlen_attn(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        assert call["max_q"] == call["max_k"] == 9 and torch.equal(call["cu_seq_q"], call["cu_seq_k"])
        return packed_attention(call["query"], call["key"], call["value"], call["cu_seq_q"])

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    assert_is_our_definition("torch varlen")


def test_call_of_xformers(monkeypatch):
    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            mask = cls()
            mask.bounds = cumulative(q_seqlen)
            return mask

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.shape[0] == 1 and p == 0.0  # [batch, tokens, heads, D]
        return packed_attention(query[0], key[0], value[0], attn_bias.bounds)[None]

    fmha = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask, memory_efficient_attention=memory_efficient_attention)
    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops", fmha=fmha)
    assert_is_our_definition("xformers")


def test_candidates_run_in_turn_and_failures_are_lines():
    calls, times = [], iter((3.0, 9.0, 4.0, 8.0, 2.0, 10.0, 5.0, 7.0))

    def attend(x):
        return ck.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens, backend="reference")

    def broken(x):
        raise RuntimeError("cannot serve this\nand goes on about it")

    def clock(function):
        calls.append(function)
        return next(times)

    candidates = {"first": attend, "broken": broken, "second": attend}
    results, failures = peers.measure(WORKLOAD, candidates, clock, "cpu")
    assert failures == ["small, broken: RuntimeError: cannot serve this"]
    assert [(r.candidate, r.forward, r.both) for r in results] == [("first", 2.0, 9.0), ("second", 4.0, 7.0)]
    assert results[0].error < 0.1  # bfloat16 against float32
