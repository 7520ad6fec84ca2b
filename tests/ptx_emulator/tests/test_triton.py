"""Triton kernels compiled for sm_80 and sm_90."""

import pytest
import torch

pytest.importorskip("triton")
import kernels as tk
import ptx_emulator as pe
from ptx_emulator import triton_launch


@pytest.mark.parametrize("warps", [2, 8])
def test_softmax(warps):
    x = torch.randn(6, 500)
    y = torch.zeros_like(x)
    r = triton_launch(tk.softmax, (6,), x, y, 500, x.stride(0), BLOCK=512, num_warps=warps)
    assert torch.allclose(y, torch.softmax(x, 1), atol=1e-6)
    assert r["mufu_lane_ops"] >= 6 * 500


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dt,warps,stages", [(torch.bfloat16, 4, 3), (torch.float16, 8, 2), (torch.float32, 4, 2)])
def test_matmul(target, dt, warps, stages):
    M, N, K = 100, 144, 96
    a, b, c = torch.randn(M, K).to(dt), torch.randn(K, N).to(dt), torch.zeros(M, N)
    r = triton_launch(
        tk.matmul, (2, 3), a, b, c, M, N, K, BM=64, BN=64, BK=32, target=target, num_warps=warps, num_stages=stages
    )
    ref = a.double() @ b.double()
    tol = 0.05 if dt == torch.float32 else 1e-4
    assert (c.double() - ref).abs().max() < tol
    assert r["tensor_flops"] == 2 * 128 * 192 * 96
    if target == 90:
        assert any("wgmma" in o for o in r["by_opcode"])


def test_layernorm_atomics():
    n, rows = 300, 20
    x, w = torch.randn(rows, n), torch.randn(n)
    y, dw = torch.zeros_like(x), torch.zeros(n)
    r = triton_launch(tk.layernorm, (rows,), x, y, w, dw, n, 1e-5, BLOCK=512)
    h = torch.nn.functional.layer_norm(x, (n,))
    assert torch.allclose(y, h * w, atol=1e-5) and torch.allclose(dw, h.sum(0), atol=1e-4)
    assert r["global"]["atomic"]["requests"] > 0


@pytest.mark.parametrize(
    "target,T,D,BD,warps,stages",
    [
        (80, 256, 64, 64, 4, 2),
        (80, 200, 64, 64, 8, 3),
        (80, 130, 72, 128, 4, 2),
        (80, 130, 72, 128, 8, 2),
        (80, 128, 64, 64, 4, 1),
        (90, 256, 64, 64, 4, 2),
        (90, 130, 72, 128, 8, 2),
        (90, 200, 64, 64, 8, 3),
    ],
)
def test_attention(target, T, D, BD, warps, stages):
    H = 2
    q, k, v = (torch.randn(H, T, D).bfloat16() for _ in range(3))
    o, lse = torch.zeros(H, T, D), torch.zeros(H, T)
    bm = 128 if warps == 8 else 64
    triton_launch(
        tk.attention,
        ((T + bm - 1) // bm, H),
        q,
        k,
        v,
        o,
        lse,
        T,
        D**-0.5,
        q.stride(0),
        q.stride(1),
        D,
        BM=bm,
        BN=64,
        BD=BD,
        target=target,
        num_warps=warps,
        num_stages=stages,
    )
    s = q.double() @ k.double().transpose(1, 2) * D**-0.5
    ref = torch.softmax(s, -1) @ v.double()
    assert (o.double() - ref).abs().max() < 0.02
    assert (lse.double() * 0.6931471805599453 - torch.logsumexp(s, -1)).abs().max() < 2e-3


def test_attention_1024():
    import time

    T, D = 1024, 64
    q, k, v = (torch.randn(1, T, D).bfloat16() for _ in range(3))
    o, lse = torch.zeros(1, T, D), torch.zeros(1, T)
    t = time.time()
    r = triton_launch(tk.attention, (8, 1), q, k, v, o, lse, T, 0.125, T * D, D, D, BM=128, BN=64, BD=64, num_warps=4)
    assert time.time() - t < 60
    ref = torch.softmax(q.double() @ k.double().transpose(1, 2) * 0.125, -1) @ v.double()
    assert (o.double() - ref).abs().max() < 0.02
    assert r["tensor_flops"] == 4 * T * T * D and r["mufu_lane_ops"] >= T * T
    print(f"\n1024 tokens: {r['seconds']:.2f} s, {r['lane_ops_per_second'] / 1e6:.0f} M lane-ops/s")


def test_tensor_descriptor():
    x = torch.randn(96, 64)
    y = torch.zeros_like(x)
    triton_launch(tk.tma_copy, (3, 2), x, y, 96, 64, BM=32, BN=32, target=90)
    assert torch.equal(y, 2 * x)


def test_sass(tmp_path):
    from ptx_emulator import sass

    a, b, c = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    r = triton_launch(tk.matmul, (1, 1), a, b, c, 64, 64, 64, BM=64, BN=64, BK=32)
    p = tmp_path / "m.cubin"
    p.write_bytes(r.compiled.cubin)
    s = sass.analyse(str(p))["matmul"]
    assert s["registers"] > 16 and s["spill_stores"] == 0 and s["mix"]["tensor"] > 0 and s["hot_loop"]["tensor"] > 0
    assert "registers" in sass.table({"matmul": s})


@pytest.mark.parametrize(
    "target,dt",
    [(80, torch.int8), (90, torch.int8), (89, torch.float8_e4m3fn), (90, torch.float8_e4m3fn), (90, torch.float8_e5m2)],
)
def test_matmul_8bit(target, dt):
    M, N, K = 64, 64, 128
    if dt == torch.int8:
        a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((M, K), (K, N)))
        c, fn = torch.zeros(M, N, dtype=torch.int32), tk.matmul_i8
    else:
        a, b = torch.randn(M, K).to(dt), torch.randn(K, N).to(dt)
        c, fn = torch.zeros(M, N), tk.matmul
    r = triton_launch(fn, (1, 1), a, b, c, M, N, K, BM=64, BN=64, BK=64, target=target)
    assert (c.double() - a.double() @ b.double()).abs().max() < 1e-3
    assert r["tensor_flops"] == 2 * M * N * K


def _wgmma_ptx():
    a, b, c = torch.randn(128, 128).bfloat16(), torch.randn(128, 64).bfloat16(), torch.zeros(128, 64)
    kw = dict(BM=128, BN=64, BK=32, target=90, num_warps=4, num_stages=3)
    r = triton_launch(tk.matmul, (1, 1), a, b, c, 128, 64, 128, launch=dict(check_wgmma_regs=True, check_proxy=True), **kw)
    return r.compiled, [a, b, c, 128, 64, 128]


@pytest.mark.parametrize(
    "remove,kinds",
    [
        ("wgmma.wait_group.sync.aligned", ("wgmma", "race")),
        ("fence.proxy.async", ("proxy",)),
        ("cp.async.wait_group", ("async-copy",)),
        ("bar.sync", ("race", "async-copy", "uninitialised")),
    ],
)
def test_planted_hopper_bugs(remove, kinds):
    import re

    import numpy as np

    comp, args = _wgmma_ptx()
    bad = re.sub(r"^\s*" + re.escape(remove) + r"[^;]*;", "", comp.ptx, flags=re.M)
    assert bad != comp.ptx
    k = pe.load(bad).kernel()
    s = [np.zeros(128, np.uint8)] * (len(k.params) - len(args))
    with pytest.raises(pe.KernelError) as e:
        k.launch((1, 1), comp.block, args + s, shared=comp.shared, check_wgmma_regs=True, check_proxy=True, quantum=32)
    assert e.value.kind in kinds, e.value


@pytest.mark.parametrize(
    "op,dt",
    [
        ("m16n8k8.row.col.f32.f16.f16.f32", torch.float16),
        ("m16n8k8.row.col.f32.bf16.bf16.f32", torch.bfloat16),
        ("m16n8k4.row.col.f32.tf32.tf32.f32", torch.float32),
        ("m16n8k8.row.col.f32.tf32.tf32.f32", torch.float32),
        ("m16n8k16.row.col.s32.s8.s8.s32", torch.int8),
        ("m16n8k32.row.col.s32.u8.s8.s32", torch.int8),
    ],
)
def test_mma_shapes(op, dt):
    """Fragments are gathered here from the layout tables of the PTX manual."""

    K = int(op.split(".")[0].split("k")[1])
    isz = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.int8: 1}[dt]
    per = 4 // isz
    if dt == torch.int8:
        A, B = torch.randint(-128, 128, (16, K), dtype=dt), torch.randint(-128, 128, (K, 8), dtype=dt)
    else:
        A, B = torch.randint(-8, 8, (16, K)).to(dt), torch.randint(-8, 8, (K, 8)).to(dt)
    C = torch.randint(-50, 50, (16, 8)).to(torch.int32 if dt == torch.int8 else torch.float32)
    na, nb = 16 * K // 32 // per, 8 * K // 32 // per
    fa, fb, fc = torch.zeros(32, na, per, dtype=dt), torch.zeros(32, nb, per, dtype=dt), torch.zeros(32, 4, dtype=C.dtype)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(na * per):
            row = g if (i // per) % 2 == 0 else g + 8
            col = t * per + i % per + (4 * per if i // per >= 2 else 0)
            fa[lane, i // per, i % per] = A[row, col]
        for i in range(nb * per):
            fb[lane, i // per, i % per] = B[t * per + i % per + 4 * per * (i // per), g]
        for i in range(4):
            fc[lane, i] = C[g + 8 * (i // 2), 2 * t + i % 2]
    regs = lambda p, n: ", ".join(f"%{p}{i}" for i in range(n))
    ld = "".join(f"ld.global.b32 %{p}{i}, [%x{p}+{4 * i}];\n" for p, n in (("a", na), ("b", nb), ("c", 4)) for i in range(n))
    ptx = f""".version 8.4\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc) {{
    .reg .b32 %a<8>, %b<4>, %c<4>, %t; .reg .b64 %xa, %xb, %xc; mov.u32 %t, %tid.x;
    ld.param.u64 %xa, [pa]; mad.wide.u32 %xa, %t, {4 * na}, %xa; ld.param.u64 %xb, [pb]; mad.wide.u32 %xb, %t, {4 * nb}, %xb;
    ld.param.u64 %xc, [pc]; mad.wide.u32 %xc, %t, 16, %xc;
    {ld} mma.sync.aligned.{op} {{{regs("c", 4)}}}, {{{regs("a", na)}}}, {{{regs("b", nb)}}}, {{{regs("c", 4)}}};
    st.global.v4.b32 [%xc], {{{regs("c", 4)}}}; ret; }}"""
    pe.load(ptx).kernel().launch(1, 32, [fa, fb, fc])
    Ad = A.view(torch.uint8).double() if ".u8." in op else A.double()
    want = Ad @ B.double() + C.double()
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(4):
            assert fc[lane, i].item() == want[g + 8 * (i // 2), 2 * t + i % 2].item()


@pytest.mark.parametrize("bk,stages", [(64, 3), (32, 2), (16, 2)])
def test_matmul_tma_swizzled(bk, stages):
    """Device-side tensor maps, all swizzle widths, mbarrier pipeline and wgmma."""
    M, N, K = 120, 128, 160
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.zeros(M, N, dtype=torch.bfloat16)
    r = triton_launch(
        tk.matmul_tma,
        (2, 2),
        a,
        b,
        c,
        M,
        N,
        K,
        BM=64,
        BN=64,
        BK=bk,
        target=90,
        num_stages=stages,
        launch=dict(check_wgmma_regs=True),
    )
    ref = a.double() @ b.double().T
    assert (c.double() - ref).abs().max() < 0.01 * ref.abs().max()
    assert r["bulk_bytes"] > 0 and any("wgmma" in o for o in r["by_opcode"])


def test_cluster_launch():
    a, b, c = torch.randn(128, 64).bfloat16(), torch.randn(64, 128).bfloat16(), torch.zeros(128, 128)
    r = triton_launch(tk.matmul, (1, 1), a, b, c, 128, 128, 64, BM=128, BN=128, BK=32, target=90, options=dict(num_ctas=2))
    assert r["ctas"] == 2 and (c.double() - a.double() @ b.double()).abs().max() < 1e-4
