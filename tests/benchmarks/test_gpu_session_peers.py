"""benchmarks/gpu_session/peers.py, as far as it goes without a GPU: every peer's call against the definition.

Peers that need CUDA are replaced by functions with the signature of the real one, as documented (flash-attention 2.8.4, its
hopper interface at 0251105a and cute interface at 004b1a2e, xformers before it moved to mslk) or, for torch, as installed. So a
wrong argument, a wrong layout of q, k, v or a wrong table fails here; whether the real kernels accept the sizes only a GPU can
show.
"""

import importlib.util
import inspect
import json
import sys
import types

import pytest
import torch

import comp_kernels as ck
from benchmarks.gpu_session import peers, workloads
from benchmarks.gpu_session.session import Session
from comp_kernels.testing import cumulative

WORKLOAD = workloads.Workload("small", (5, 9, 1), 2, 16)


@pytest.fixture(autouse=True)
def nothing_compiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def packed_attention(q, k, v, cu_seqlens, scale):
    return ck.reference.rope_attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale)


def assert_is_our_definition(peer, workload=WORKLOAD):
    """As it is and with a head size that is padded."""
    _, build = peers.PEERS[peer]
    candidate = peers.Candidate(build(), turns=build is peers.flash_attn_2)
    x = workloads.make_inputs(workload, "cpu", torch.float32)
    expected = ck.reference.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens)
    torch.testing.assert_close(candidate(x), expected)
    torch.testing.assert_close(candidate(x), expected)  # with what it prepared in the first call
    if not candidate.turns:
        candidate.widths[workload.head_dim] = 32
        torch.testing.assert_close(candidate(x), expected)


def module(monkeypatch, name, **members):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))


@pytest.mark.parametrize("lengths", ((5, 9, 1), (7, 7, 7)))
@pytest.mark.parametrize("peer", ("flex", "SDPA, cuDNN first", "SDPA, flash first"))
def test_peers_that_run_on_the_cpu(peer, lengths):
    assert_is_our_definition(peer, workloads.Workload("small", lengths, 2, 16))


def test_images_of_one_length_are_one_call(monkeypatch):
    shapes = []

    def attention(q, k, v, **settings):
        shapes.append(tuple(q.shape))
        return v

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    for lengths in ((7, 7, 7), (5, 9)):
        x = workloads.make_inputs(workloads.Workload("small", lengths, 2, 16), "cpu", torch.float32)
        peers.sdpa(peers.FLASH)(x.q, x.k, x.v, x, 1.0)
    assert shapes == [(3, 2, 7, 16), (1, 2, 5, 16), (1, 2, 9, 16)]


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
        return packed_attention(q, k, v, cu_seqlens_q, softmax_scale)

    module(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    module(monkeypatch, "flash_attn.layers")
    module(monkeypatch, "flash_attn.layers.rotary", apply_rotary_emb=apply_rotary_emb)
    assert_is_our_definition("flash-attn 2")


@pytest.mark.parametrize("returns_lse", (False, True))
def test_call_of_flash_attn_3(monkeypatch, returns_lse):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
        causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == 9 and seqused_q is seqused_k is None and not causal
        out = packed_attention(q, k, v, cu_seqlens_q, softmax_scale)
        return (out, None) if returns_lse else out

    module(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func)
    assert_is_our_definition("flash-attn 3")
    hub = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    module(monkeypatch, "kernels", get_kernel={"kernels-community/flash-attn3": hub}.__getitem__)
    assert_is_our_definition("flash-attn 3 of the hub")


def test_call_of_flash_attn_4(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None,
        page_table=None, softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == 9 and not causal and page_table is None
        return packed_attention(q, k, v, cu_seqlens_q, softmax_scale), None

    module(monkeypatch, "flash_attn")
    module(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=flash_attn_varlen_func)
    assert_is_our_definition("flash-attn 4")


@pytest.mark.parametrize("kind", ("cuDNN", "flash"))
def test_call_of_torch_varlen(monkeypatch, kind):
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)  # positional names differ in no torch from 2.10 on; later ones may
    monkeypatch.setattr(varlen, "_should_use_cudnn", varlen._should_use_cudnn)  # put back afterwards

    def varlen_attn(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        assert call["max_q"] == call["max_k"] == 9 and torch.equal(call["cu_seq_q"], call["cu_seq_k"])
        assert varlen._should_use_cudnn(0) == (kind == "cuDNN")
        return packed_attention(call["query"], call["key"], call["value"], call["cu_seq_q"], call["scale"])

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    assert_is_our_definition(f"torch varlen, {kind}")


def test_call_of_xformers(monkeypatch):
    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            mask = cls()
            mask.bounds = cumulative(q_seqlen)
            return mask

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.shape[0] == 1 and p == 0.0  # [batch, tokens, heads, D]
        return packed_attention(query[0], key[0], value[0], attn_bias.bounds, scale)[None]

    fmha = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask, memory_efficient_attention=memory_efficient_attention)
    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops", fmha=fmha)
    assert_is_our_definition("xformers")


def test_peers_that_are_not_there_are_named():
    found, missing = peers.available(list(peers.PEERS), "cpu")
    assert "SDPA, cuDNN first" in found and found.keys() | missing.keys() == peers.PEERS.keys()
    for name, (wanted, _) in peers.PEERS.items():
        if importlib.util.find_spec(wanted.split(".")[0]) is None:
            assert missing[name] == f"{wanted} is not installed"


def test_a_head_size_that_a_peer_refuses_is_padded():
    """To a multiple of 16, then to a power of two; what is said of the last is what it said of the true size."""

    def picky(*accepted):
        def attend(q, k, v, x, scale):
            if q.shape[-1] not in accepted:
                raise RuntimeError(f"no kernel for {q.shape[-1]}")
            return packed_attention(q, k, v, x.cu_seqlens, scale)

        return peers.Candidate(attend)

    x = workloads.make_inputs(workloads.Workload("small", (5, 9), 2, 40), "cpu", torch.float32)
    expected = ck.reference.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens)
    for width in (40, 48, 64):
        candidate = picky(width, 256)
        torch.testing.assert_close(candidate.settle(x), expected.detach())
        assert candidate.widths == {40: width}
    with pytest.raises(RuntimeError, match="no kernel for 40"):
        picky(256).settle(x)


def test_one_row_per_workload_and_failures_are_lines(tmp_path):
    def attend(x):
        return ck.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens, backend="reference")

    def broken(x):
        raise RuntimeError("cannot serve this\nand goes on about it")

    session = Session(tmp_path, "peers", True, None)
    session.times = lambda functions: dict.fromkeys(functions, 2.0)
    peers.measure(session, WORKLOAD, {"first": attend, "broken": broken, "second": attend})
    failure, row = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert failure == {"part": "peers", "failed": "small, broken", "error": "RuntimeError: cannot serve this"}
    names = ["first, forward", "first, both", "second, forward", "second, both"]
    assert list(row["us"]) == list(row["host_us"]) == list(row["device_us"]) == names
    assert row["error"].keys() == {"first, forward", "second, forward"}
    assert all(error < 0.1 for error in row["error"].values())  # bfloat16 against float32


def test_teraflops_are_of_the_true_head_size(tmp_path):
    session = Session(tmp_path, "peers", True, None)
    session.times = lambda functions: dict.fromkeys(functions, 1e-3)
    peer = peers.Candidate(peers.sdpa(peers.FLASH))
    x = workloads.Workload("small", (64, 65), 2, 24)
    peers.measure(session, x, {"SDPA": peer})
    row = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    flops = 4 * 24 * 2 * (64 * 64 + 65 * 65)
    assert row["teraflops"] == {"SDPA, forward": round(flops / 1e3, 1), "SDPA, both": round(3.5 * flops / 1e3, 1)}
    assert row["padded"] == {}


def test_errors_are_found_in_the_first_the_longest_and_the_last_image():
    x = workloads.make_inputs(workloads.Workload("small", (5, 9, 200, 3, 4), 2, 16), "cpu", torch.float32)
    out = ck.reference.rope_attention(x.q, x.k, x.v, x.cos, x.sin, x.cu_seqlens)
    assert workloads.largest_error(out, x) < 1e-5
    for row in (0, 14 + 127, 220):
        wrong = out.clone()
        wrong[row, 1, 3] += 1
        assert workloads.largest_error(wrong, x) == pytest.approx(1, abs=1e-4)
