"""Every arithmetic instruction against numpy, on random inputs and edge values."""

import numpy as np
import ptx_emulator as pe
import pytest

RNG = np.random.default_rng(1)
NP = {
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "b16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
}
N = 1024


def run(op, dt, srcs, arrays, imm="", regs="", body=None):
    """One instruction: d = op(a, b, c); returns the stored results."""
    size = {"u16": 2, "s16": 2, "f16": 2, "b16": 2, "bf16": 2}.get(dt, 8 if dt.endswith("64") else 4)
    ld, use = [], []
    for k, t in enumerate(srcs):
        s = arrays[k].itemsize
        ld.append(
            f".reg .b{8 * s} %a{k}; .reg .b64 %q{k}; ld.param.u64 %q{k}, [p{k}]; mad.wide.u32 %q{k}, %i, {s}, %q{k}; ld.global.b{8 * s} %a{k}, [%q{k}];"
        )
        use.append(f"%a{k}")
    params = ", ".join(f".param .u64 p{k}" for k in range(len(srcs)))
    code = body or f"{op} %d, {', '.join(use)}{imm};"
    ptx = f""".version 8.5\n.target sm_90\n.address_size 64\n.visible .entry k({params}, .param .u64 out) {{
    .reg .b32 %i, %x, %y; .reg .b64 %o; .reg .b{8 * size} %d; .reg .pred %p, %q; {regs}
    mov.u32 %x, %ctaid.x; mov.u32 %y, %tid.x; mad.lo.u32 %i, %x, 128, %y;
    {chr(10).join(ld)}
    {code}
    ld.param.u64 %o, [out]; mad.wide.u32 %o, %i, {size}, %o; st.global.b{8 * size} [%o], %d; ret; }}"""
    out = np.zeros(N, {2: np.uint16, 4: np.uint32, 8: np.uint64}[size])
    pe.load(ptx).kernel("k").launch(N // 128, 128, [*arrays, out], check_uninit_reg=True)
    return out.view(NP.get(dt, out.dtype))


def ints(t, n=N):
    i = np.iinfo(NP[t])
    a = RNG.integers(i.min, i.max, n, dtype=NP[t], endpoint=True)
    edge = np.array([0, 1, 2, i.max, i.min, i.max - 1, i.max // 2, (-1 if i.min else i.max)], dtype=NP[t])
    a[:200] = RNG.choice(edge, 200)
    a[200:400] = RNG.integers(0, 40, 200).astype(NP[t])
    return a


def floats(t, n=N):
    f = np.finfo(NP[t])
    a = (RNG.standard_normal(n) * np.exp2(RNG.integers(-20 if t != "f16" else -6, 20 if t != "f16" else 6, n))).astype(NP[t])
    e = np.array(
        [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, f.max, f.min, f.tiny, -f.tiny, f.smallest_subnormal, 0.5, 1.5, 2.5], NP[t]
    )
    a[:300] = RNG.choice(e, 300)
    return a


def same(got, want):
    got, want = np.asarray(got), np.asarray(want)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    g, w = got[~nan], want[~nan]
    bad = g.view(f"u{g.itemsize}") != w.view(f"u{w.itemsize}")
    assert not bad.any(), (g[bad][:5], w[bad][:5])


def fma_exact(a, b, c, dt):
    """Correctly rounded a*b+c of finite values, through exact rationals."""
    from fractions import Fraction as F

    out = []
    for x, y, z in zip(a, b, c):
        e = F(float(x)) * F(float(y)) + F(float(z))
        n = dt(float(e))
        if e != 0 and np.isfinite(n):
            cand = [np.nextafter(n, dt(-np.inf)), n, np.nextafter(n, dt(np.inf))]
            cand = [q for q in cand if np.isfinite(q)]
            u = {2: np.uint16, 4: np.uint32}[n.itemsize]
            n = min(cand, key=lambda q: (abs(F(float(q)) - e), int(q.view(u)) & 1))
        elif e == 0:
            p = x.astype(np.float64) * y.astype(np.float64)
            n = dt(p + np.float64(z))
        out.append(n)
    return np.array(out, dt)


I = ["u16", "s16", "u32", "s32", "u64", "s64"]
obj = lambda a: a.astype(object)


def wrap(v, t):
    b = 8 * np.dtype(NP[t]).itemsize
    x = np.array([int(q) & ((1 << b) - 1) for q in v], dtype=object)
    return x.astype(f"u{b // 8}").view(NP[t])


@pytest.mark.parametrize("t", I)
def test_int_binary(t):
    a, b, c = ints(t), ints(t), ints(t)
    bits = 8 * np.dtype(NP[t]).itemsize
    A, B, Cc = obj(a), obj(b), obj(c)
    for op, w in [
        ("add", A + B),
        ("sub", A - B),
        ("mul.lo", A * B),
        ("min", np.minimum(a, b)),
        ("max", np.maximum(a, b)),
        ("mul.hi", [(int(x) * int(y)) >> bits for x, y in zip(A, B)]),
    ]:
        assert np.array_equal(run(f"{op}.{t}", t, [t, t], [a, b]), wrap(w, t)), op
    assert np.array_equal(run(f"mad.lo.{t}", t, [t] * 3, [a, b, c]), wrap(A * B + Cc, t))
    assert np.array_equal(
        run(f"mad.hi.{t}", t, [t] * 3, [a, b, c]), wrap([((int(x) * int(y)) >> bits) + int(z) for x, y, z in zip(A, B, Cc)], t)
    )
    nz = np.where(b == 0, 3, b).astype(NP[t])
    q = [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(A, obj(nz))]
    assert np.array_equal(run(f"div.{t}", t, [t, t], [a, nz]), wrap(q, t))
    assert np.array_equal(run(f"rem.{t}", t, [t, t], [a, nz]), wrap([int(x) - int(y) * z for x, y, z in zip(A, obj(nz), q)], t))
    assert np.array_equal(
        run(f"sad.{t}", t, [t] * 3, [a, b, c]), wrap([int(z) + abs(int(x) - int(y)) for x, y, z in zip(A, B, Cc)], t)
    )
    if bits < 64:
        wt = t[0] + str(2 * bits)
        assert np.array_equal(run(f"mul.wide.{t}", wt, [t, t], [a, b]), wrap(A * B, wt))
        d = ints(wt)
        assert np.array_equal(run(f"mad.wide.{t}", wt, [t, t, wt], [a, b, d]), wrap(A * B + obj(d), wt))
    if t[0] == "s":
        assert np.array_equal(run(f"neg.{t}", t, [t], [a]), wrap(-A, t))
        assert np.array_equal(run(f"abs.{t}", t, [t], [a]), wrap(np.abs(A), t))
    sh = RNG.integers(0, bits + 8, N).astype(np.uint32)
    U = obj(a.view(f"u{bits // 8}"))
    assert np.array_equal(run(f"shl.b{bits}", t, [t, "u32"], [a, sh]), wrap([int(x) << int(s) for x, s in zip(U, sh)], t))
    assert np.array_equal(run(f"shr.{t}", t, [t, "u32"], [a, sh]), wrap([int(x) >> int(s) for x, s in zip(A, sh)], t))


def test_logic_and_bits():
    a, b, c = ints("u32"), ints("u32"), ints("u32")
    for op, w in [("and", a & b), ("or", a | b), ("xor", a ^ b)]:
        assert np.array_equal(run(f"{op}.b32", "u32", ["b32"] * 2, [a, b]), w)
    assert np.array_equal(run("not.b32", "u32", ["b32"], [a]), ~a)
    for lut in (0xE8, 0x96, 0xCA, 0x01, 0xFE, 0x3C):
        w = np.zeros_like(a)
        for k in range(8):
            if lut >> k & 1:
                w |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        assert np.array_equal(run("lop3.b32", "u32", ["b32"] * 3, [a, b, c], imm=f", {lut}"), w)
    A, B = a.astype(object), b.astype(object)
    n = RNG.integers(0, 40, N).astype(np.uint32)
    cat = [(int(y) << 32) | int(x) for x, y in zip(A, B)]
    for md, f in (("wrap", lambda s: s & 31), ("clamp", lambda s: min(s, 32))):
        assert np.array_equal(
            run(f"shf.l.{md}.b32", "u32", ["b32"] * 2 + ["u32"], [a, b, n]),
            wrap([(v << f(int(s))) >> 32 for v, s in zip(cat, n)], "u32"),
        )
        assert np.array_equal(
            run(f"shf.r.{md}.b32", "u32", ["b32"] * 2 + ["u32"], [a, b, n]),
            wrap([v >> f(int(s)) for v, s in zip(cat, n)], "u32"),
        )
    assert np.array_equal(run("popc.b32", "u32", ["b32"], [a]), [bin(x).count("1") for x in a])
    assert np.array_equal(run("clz.b32", "u32", ["b32"], [a]), [32 - int(x).bit_length() for x in a])
    assert np.array_equal(run("brev.b32", "u32", ["b32"], [a]), [int(f"{x:032b}"[::-1], 2) for x in a])
    assert np.array_equal(run("bfind.u32", "u32", ["u32"], [a]), [(int(x).bit_length() - 1) & 0xFFFFFFFF for x in a])
    pos, ln = RNG.integers(0, 34, N).astype(np.uint32), RNG.integers(0, 34, N).astype(np.uint32)
    assert np.array_equal(
        run("bfe.u32", "u32", ["u32"] * 3, [a, pos, ln]),
        wrap([(int(x) >> int(p)) & ((1 << int(l)) - 1) for x, p, l in zip(a, pos, ln)], "u32"),
    )

    def bfes(x, p, l):
        x, p, l = int(x), int(p), int(l)
        if l == 0:
            return 0
        sb = (x >> min(p + l - 1, 31)) & 1
        v = (x >> p) & ((1 << l) - 1) if p < 32 else 0
        have = min(l, max(0, 32 - p))
        return v | (((1 << 32) - 1) << have if sb and have < 32 else 0)

    assert np.array_equal(
        run("bfe.s32", "u32", ["s32", "u32", "u32"], [a, pos, ln]), wrap([bfes(*z) for z in zip(a, pos, ln)], "u32")
    )

    def bfi(x, y, p, l):
        m = ((1 << int(l)) - 1) << int(p)
        return (int(y) & ~m) | ((int(x) << int(p)) & m)

    assert np.array_equal(
        run("bfi.b32", "u32", ["b32"] * 2 + ["u32"] * 2, [a, b, pos, ln]),
        wrap([bfi(*z) & 0xFFFFFFFF for z in zip(a, b, pos, ln)], "u32"),
    )

    def prmt(x, y, s):
        v = (int(y) << 32 | int(x)).to_bytes(8, "little")
        r = []
        for j in range(4):
            q = (int(s) >> (4 * j)) & 15
            by = v[q & 7]
            r.append((255 if by & 128 else 0) if q & 8 else by)
        return int.from_bytes(bytes(r), "little")

    assert np.array_equal(run("prmt.b32", "u32", ["b32"] * 3, [a, b, c]), [prmt(*z) for z in zip(a, b, c)])
    for s1, s2 in (("u32", "u32"), ("s32", "u32"), ("s32", "s32")):
        f = lambda x, t: np.frombuffer(np.uint32(x).tobytes(), np.int8 if t == "s32" else np.uint8).astype(int)
        w = [int((f(x, s1) * f(y, s2)).sum()) + int(z) for x, y, z in zip(a, b, c)]
        assert np.array_equal(run(f"dp4a.{s1}.{s2}", "u32", [s1, s2, "u32"], [a, b, c]), wrap(w, "u32"))
    p = RNG.integers(0, 2, N).astype(np.uint32)
    got = run("", "u32", ["b32", "b32", "u32"], [a, b, p], body="setp.ne.u32 %p, %a2, 0; selp.b32 %d, %a0, %a1, %p;")
    assert np.array_equal(got, np.where(p, a, b))


def test_carry():
    a, b = ints("u64"), ints("u64")
    body = """.reg .b32 %l, %h, %l2, %h2; mov.b64 {%l, %h}, %a0; mov.b64 {%l2, %h2}, %a1;
      add.cc.u32 %l, %l, %l2; addc.u32 %h, %h, %h2; mov.b64 %d, {%l, %h};"""
    assert np.array_equal(run("", "u64", ["u64"] * 2, [a, b], body=body), a + b)
    assert np.array_equal(
        run("", "u64", ["u64"] * 2, [a, b], body=body.replace("add.cc", "sub.cc").replace("addc", "subc")), a - b
    )


@pytest.mark.parametrize("t", ["s32", "u32", "s64", "u64", "s16", "f32", "f64", "f16"])
def test_setp(t):
    a, b = (floats(t), floats(t)) if t[0] == "f" else (ints(t), ints(t))
    b[:300] = RNG.permutation(a[:300])
    b[::7] = a[::7]
    nan = np.isnan(a.astype(float)) | np.isnan(b.astype(float))
    ops = {"eq": a == b, "ne": (a != b) & ~nan, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if t[0] == "f":
        ops.update({k + "u": v | nan for k, v in list(ops.items())})
        ops.update(num=~nan, nan=nan)
    with np.errstate(all="ignore"):
        for op, w in ops.items():
            g = run(
                "",
                "u32",
                [t, t],
                [a, b],
                body=f"setp.{op}.{t} %p|%q, %a0, %a1; selp.u32 %d, 1, 0, %p; .reg .b32 %e; selp.u32 %e, 2, 0, %q; or.b32 %d, %d, %e;",
            )
            assert np.array_equal(g, np.where(w, 1, 2)), op


@pytest.mark.parametrize("t", ["f32", "f64"])
def test_float(t):
    a, b, c = floats(t), floats(t), floats(t)
    with np.errstate(all="ignore"):
        for op, w in [("add.rn", a + b), ("sub.rn", a - b), ("mul.rn", a * b), ("div.rn", a / b)]:
            same(run(f"{op}.{t}", t, [t, t], [a, b]), w)
        fin = lambda x: np.where(np.isfinite(x), x, 1).astype(x.dtype)
        if t == "f32":
            A, B, Cc = fin(a) * np.float32(1e-3), fin(b), fin(c)
            A, B, Cc = (np.clip(x, -1e15, 1e15).astype(np.float32) for x in (A, B, Cc))
            same(run("fma.rn.f32", t, [t] * 3, [A, B, Cc]), fma_exact(A, B, Cc, np.float32))
            for rm in ("rz", "rm", "rp"):
                ex = A.astype(np.float64) * B.astype(np.float64)
                n = ex.astype(np.float32)
                up, dn = np.nextafter(n, np.float32(np.inf)), np.nextafter(n, np.float32(-np.inf))
                lo, hi = np.where(n.astype(np.float64) > ex, dn, n), np.where(n.astype(np.float64) < ex, up, n)
                w = {"rm": lo, "rp": hi, "rz": np.where(ex > 0, lo, hi)}[rm]
                g = run(f"mul.{rm}.f32", t, [t, t], [A, B])
                assert np.array_equal(g, w), rm
            s = run("add.sat.f32", t, [t, t], [a, b])
            same(s, np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1)).astype(np.float32) + np.float32(0))
            z = run("mul.ftz.f32", t, [t, t], [a, b])
            den = lambda x: np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x).astype(np.float32)
            same(z, den(den(a) * den(b)))
        same(run(f"neg.{t}", t, [t], [a]), -a)
        same(run(f"abs.{t}", t, [t], [a]), np.abs(a))
        mn, mx = np.fmin(a, b), np.fmax(a, b)
        zz = (a == 0) & (b == 0)
        mn = np.where(zz, np.where(np.signbit(a) | np.signbit(b), -0.0, 0.0), mn).astype(NP[t])
        mx = np.where(zz, np.where(np.signbit(a) & np.signbit(b), -0.0, 0.0), mx).astype(NP[t])
        same(run(f"min.{t}", t, [t, t], [a, b]), mn)
        same(run(f"max.{t}", t, [t, t], [a, b]), mx)
        if t == "f32":
            same(run("max.NaN.f32", t, [t, t], [a, b]), np.where(np.isnan(a) | np.isnan(b), np.nan, mx).astype(np.float32))
        same(run(f"rcp.rn.{t}", t, [t], [a]), 1 / a)
        same(run(f"sqrt.rn.{t}", t, [t], [a]), np.sqrt(a))


def test_mufu():
    a = (RNG.standard_normal(N) * 8).astype(np.float32)
    p = np.abs(a) + np.float32(1e-3)
    for op, x, f in [
        ("ex2", a, np.exp2),
        ("lg2", p, np.log2),
        ("sin", a, np.sin),
        ("cos", a, np.cos),
        ("tanh", a, np.tanh),
        ("rsqrt", p, lambda v: 1 / np.sqrt(v)),
        ("rcp", a, lambda v: 1 / v),
        ("sqrt", p, np.sqrt),
    ]:
        g = run(f"{op}.approx.f32", "f32", ["f32"], [x]).astype(np.float64)
        assert np.allclose(g, f(x.astype(np.float64)), rtol=3e-7, atol=1e-7), op
    e = np.tile(np.array([0, -np.inf, np.inf, np.nan, -200, 200, 1, -1], np.float32), N // 8)
    same(
        run("ex2.approx.ftz.f32", "f32", ["f32"], [e]),
        np.tile(np.array([1, 0, np.inf, np.nan, 0, np.inf, 2, 0.5], np.float32), N // 8),
    )


def bf(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16()


def test_half():
    import torch

    a, b, c = floats("f16"), floats("f16"), floats("f16")
    with np.errstate(all="ignore"):
        for op, w in [("add", a + b), ("sub", a - b), ("mul", a * b)]:
            same(run(f"{op}.f16", "f16", ["f16"] * 2, [a, b]), w)
            g = run(f"{op}.f16x2", "u32", ["b32"] * 2, [np.tile(a.view(np.uint32), 2), np.tile(b.view(np.uint32), 2)])
            same(g.view(np.float16)[:N], w)
        ok = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
        A, B, Cc = (np.where(ok, x, 1).astype(np.float16) for x in (a, b, c))
        same(run("fma.rn.f16", "f16", ["f16"] * 3, [A, B, Cc]), fma_exact(A, B, Cc, np.float16))
        f = (RNG.standard_normal((3, N)) * 4).astype(np.float32)
        x, y, z = (bf(v) for v in f)
        i16 = lambda t: t.view(torch.int16).numpy().view(np.uint16)
        for op, w in [("add", x + y), ("mul", x * y), ("sub", x - y)]:
            assert np.array_equal(run(f"{op}.bf16", "b16", ["b16"] * 2, [i16(x), i16(y)]), i16(w)), op
        w = bf((x.double() * y.double() + z.double()).float().numpy())
        g = run("fma.rn.bf16", "b16", ["b16"] * 3, [i16(x), i16(y), i16(z)])
        assert (g != i16(w)).mean() < 0.01  # the reference rounds twice
        assert np.array_equal(run("max.bf16", "b16", ["b16"] * 2, [i16(x), i16(y)]), i16(torch.maximum(x, y)))
        same(
            run("min.f16", "f16", ["f16"] * 2, [A, B]),
            np.where((A == 0) & (B == 0), np.where(np.signbit(A) | np.signbit(B), -0.0, 0.0), np.minimum(A, B)).astype(
                np.float16
            ),
        )


def test_cvt():
    import torch

    f = floats("f32")
    with np.errstate(all="ignore"):
        same(run("cvt.rn.f16.f32", "f16", ["f32"], [f]), f.astype(np.float16))
        h = floats("f16")
        same(run("cvt.f32.f16", "f32", ["f16"], [h]), h.astype(np.float32))
        g = run("cvt.rn.bf16.f32", "b16", ["f32"], [f])
        w = bf(f).view(torch.int16).numpy().view(np.uint16)
        ok = ~np.isnan(f)
        assert np.array_equal(g[ok], w[ok])
        f2 = RNG.permutation(f)
        g = run("cvt.rn.bf16x2.f32", "u32", ["f32", "f32"], [f, f2])
        w2 = bf(f2).view(torch.int16).numpy().view(np.uint16)
        k = ok & ~np.isnan(f2)
        assert np.array_equal((g >> 16)[k], w[k].astype(np.uint32)) and np.array_equal((g & 0xFFFF)[k], w2[k].astype(np.uint32))
        g = run("cvt.rn.f16x2.f32", "u32", ["f32", "f32"], [f, f2])
        same((g & 0xFFFF).astype(np.uint16).view(np.float16), f2.astype(np.float16))
        d = f.astype(np.float64)
        for dt, lo, hi in (
            ("s32", -(2**31), 2**31 - 1),
            ("u32", 0, 2**32 - 1),
            ("s16", -(2**15), 2**15 - 1),
            ("s64", -(2**63), 2**63 - 1),
        ):
            for rm, fn in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
                r = fn(d)
                want = [0 if np.isnan(v) else lo if v <= lo else hi if v >= hi else int(v) for v in r]
                got = run(f"cvt.{rm}.{dt}.f32", dt, ["f32"], [f])
                q = ~np.isnan(f)
                assert np.array_equal(got[q], np.array(want, dtype=object)[q].astype(NP[dt])), (dt, rm)
        for st in ("s32", "u32", "s64", "u64", "s16", "u16"):
            a = ints(st)
            same(run(f"cvt.rn.f32.{st}", "f32", [st], [a]), a.astype(np.float32))
            same(run(f"cvt.rn.f64.{st}", "f64", [st], [a]), a.astype(np.float64))
            for dt in ("s32", "u32", "s64", "u64", "s16", "u16"):
                assert np.array_equal(run(f"cvt.{dt}.{st}", dt, [st], [a]), a.astype(NP[dt])), (dt, st)
        a = ints("s32")
        assert np.array_equal(run("cvt.sat.u16.s32", "u16", ["s32"], [a]), np.clip(a, 0, 65535).astype(np.uint16))
        for dt, td in (("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)):
            x = (RNG.standard_normal(N) * 20).astype(np.float32)
            y = RNG.permutation(x)
            g = run(f"cvt.rn.satfinite.{dt}.f32", "b16", ["f32", "f32"], [x, y])
            w = [torch.from_numpy(v).to(td).view(torch.uint8).numpy().astype(np.uint16) for v in (x, y)]
            assert np.array_equal(g, w[0] << 8 | w[1]), dt
            back = run(f"cvt.rn.f16x2.{dt}", "u32", ["b16"], [g])
            lo = (back & 0xFFFF).astype(np.uint16).view(np.float16)
            assert np.array_equal(lo, torch.from_numpy((g & 255).astype(np.uint8)).view(td).to(torch.float16).numpy())
        t = run("cvt.rna.tf32.f32", "u32", ["f32"], [f])
        u = f.view(np.uint32)
        q = np.isfinite(f) & (np.abs(f) < 1e38)
        assert np.array_equal(t[q], ((u[q] + 0x1000) & ~np.uint32(0x1FFF)))
