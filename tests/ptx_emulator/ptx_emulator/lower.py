"""Syntax tree to engine instructions.

Every kernel is lowered together with the device functions it calls.  Registers, immediates and special
registers all live in one register file of 32-lane arrays; an instruction refers to them by byte offset.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from .parser import TYPE_SIZE, Imm, Instr, Mem, Module, Pair, Paren, PtxError, Reg, Sym, Vec

NONE = 0xFFFFFFFF
K = dict(normal=0, bra=1, brx=2, call=3, callr=4, ret=5, exit=6, trap=7, bar=8, wsync=9, aligned=10, warpbar=11, poll=12)
WIN_FUNC = 0x5D00 << 48
FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
SPACES = {"global": 1, "shared": 2, "local": 3, "param": 4, "const": 1}
SPEC = [
    "tid.x",
    "tid.y",
    "tid.z",
    "ntid.x",
    "ntid.y",
    "ntid.z",
    "ctaid.x",
    "ctaid.y",
    "ctaid.z",
    "nctaid.x",
    "nctaid.y",
    "nctaid.z",
    "laneid",
    "warpid",
    "nwarpid",
    "smid",
    "nsmid",
    "gridid",
    "lanemask_eq",
    "lanemask_lt",
    "lanemask_le",
    "lanemask_gt",
    "lanemask_ge",
    "clusterid.x",
    "clusterid.y",
    "clusterid.z",
    "nclusterid.x",
    "nclusterid.y",
    "nclusterid.z",
    "cluster_ctaid.x",
    "cluster_ctaid.y",
    "cluster_ctaid.z",
    "cluster_nctaid.x",
    "cluster_nctaid.y",
    "cluster_nctaid.z",
    "cluster_ctarank",
    "cluster_nctarank",
    "dynamic_smem_size",
    "total_smem_size",
    "is_explicit_cluster",
]
SPEC_INDEX = {n: i for i, n in enumerate(SPEC)}
SPEC_INDEX["aggr_smem_size"] = SPEC_INDEX["total_smem_size"]
CMP = {c: i for i, c in enumerate(["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])}
CMP.update(lo=2, ls=3, hi=4, hs=5)
RND = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4}
CTY = {t: i for i, t in enumerate(["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64", "tf32"])}
MTY = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4, "s8": 5, "u8": 6, "f64": 7}
ATY = {
    "u32": 0,
    "b32": 0,
    "s32": 1,
    "u64": 2,
    "b64": 2,
    "s64": 3,
    "f32": 4,
    "f64": 5,
    "f16": 6,
    "bf16": 7,
    "f16x2": 8,
    "bf16x2": 9,
    "b16": 10,
}
AOP = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5, "exch": 6, "cas": 7, "inc": 8, "dec": 9}
TMTY = {
    "u8": 0,
    "u16": 1,
    "u32": 2,
    "s32": 3,
    "u64": 4,
    "s64": 5,
    "f16": 6,
    "f32": 7,
    "f64": 8,
    "bf16": 9,
    "b16": 1,
    "b32": 2,
    "b64": 4,
}

FP32_OPS = {"add", "sub", "mul", "fma", "mad", "min", "max", "neg", "abs", "copysign", "setp", "set", "testp", "div"}
MUFU = {"ex2", "lg2", "sin", "cos", "rcp", "rsqrt", "sqrt", "tanh"}


@dataclass
class Meta:
    """What the report needs to know about an instruction."""

    op: str
    line: int
    src: tuple
    cls: str
    flops: int = 0
    mem: str = ""  # global_ld, global_st, shared_ld, shared_st, atomic, cp_async ...


@dataclass
class Lowered:
    name: str
    ops: list
    rows: list
    pool: list
    regl: list
    consts: list
    spec: list
    rf: int
    local: int
    gran: int
    funcs: list
    slots: list
    brx: list
    meta: list
    params: list  # (name, type, offset, size, align)
    param_size: int
    static_shared: int
    extern_shared: bool
    directives: dict
    var_refs: list = field(default_factory=list)


def align(x: int, a: int) -> int:
    return (x + a - 1) // a * a


def function_names(mod: Module) -> list:
    """Device functions with a body; the position is the function's number in its address."""
    return [n for n, f in mod.functions.items() if f.body and not f.entry]


def param_layout(params: list) -> tuple:
    off, out = 0, []
    for p in params:
        off = align(off, max(1, p.align))
        out.append((p.name, p.type, off, p.size, p.align))
        off += p.size
    return out, off


class Lowerer:
    def __init__(self, mod: Module, kernel: str, var_addr: dict):
        self.mod, self.kname = mod, kernel
        self.var_addr = var_addr  # module .global/.const variables: host addresses
        self.f = mod.functions[kernel]
        self.rows: list = []
        self.ops: dict = {}
        self.pool: list = []
        self.regl: list = []
        self.meta: list = []
        self.consts: dict = {}
        self.rf = 64
        self.local = 16  # offset 0 stays unused
        self.shared = 0
        self.spec = [NONE] * len(SPEC)
        self.funcs: list = []
        self.slots: list = []
        self.brx: list = []
        self.gran_sizes: set = set()
        self.fn_index: dict = {}
        self.fn_queue: list = []

    # ---- top ----
    def run(self) -> Lowered:
        self.shared_addr: dict = {}
        used = self.used_symbols()
        for v in self.mod.variables.values():
            if v.space == "shared" and not (v.extern and v.size == 0) and v.name in used:
                self.shared = align(self.shared, v.align)
                self.shared_addr[v.name] = self.shared
                self.shared += v.size
        self.fn_vars: dict = {}
        for name in self.reach:
            f = self.mod.functions[name]
            for key, v in f.vars.items():
                if v.space == "shared" and not (v.extern and v.size == 0):
                    self.shared = align(self.shared, v.align)
                    self.shared_addr[f"{name}:{key}"] = self.shared
                    self.shared += v.size
        ext = [v for v in self.mod.variables.values() if v.space == "shared" and v.extern and v.size == 0]
        al = max([v.align for v in ext] + [16 if ext else 1])
        dyn = align(self.shared, al) if ext else self.shared
        for v in ext:
            self.shared_addr[v.name] = dyn
        static = dyn if ext else self.shared
        self.kparams, psize = param_layout(self.f.params)
        order = [self.kname] + [n for n in self.reach if n != self.kname]
        names = function_names(self.mod)
        self.funcs = [[0, 0, 0, 0] for _ in names]
        for n in order[1:]:
            fn = self.mod.functions[n]
            self.fn_index[n] = names.index(n)
            base = len(self.slots)
            sl = []
            for p in fn.params + fn.rets:
                sz = p.size
                self.local = align(self.local, max(p.align, min(16, sz) if sz in (1, 2, 4, 8, 16) else p.align))
                sl.append((self.local, sz))
                self.local += sz
            for s in sl:
                self.slots += list(s)
            self.funcs[self.fn_index[n]] = [0, len(fn.params), len(fn.rets), base]
            self.fn_vars[n] = sl
        for n in order:
            self.function(n)
        if any(v.extern for v in ext):
            pass
        small = [s for s in self.gran_sizes if s < 4]
        gran = 0 if 1 in small else 1 if 2 in small else 2
        return Lowered(
            self.kname,
            list(self.ops),
            self.rows,
            self.pool,
            self.regl,
            [(o, s, v) for (s, v), o in self.consts.items()],
            self.spec,
            align(self.rf, 64),
            align(self.local, 16),
            gran,
            self.funcs,
            self.slots,
            self.brx,
            self.meta,
            self.kparams,
            psize,
            static,
            bool(ext),
            self.f.directives,
        )

    def used_symbols(self) -> set:
        used: set = set()
        self.reach: list = []
        todo = [self.kname]

        def walk(o: Any) -> None:
            if isinstance(o, Sym):
                used.add(o.name)
                fn = self.mod.functions.get(o.name)
                if fn is not None and fn.body and not fn.entry:
                    todo.append(o.name)
            elif isinstance(o, Mem):
                walk(o.base)
                for x in o.extra:
                    walk(x)
            elif isinstance(o, (Vec, Paren)):
                for x in o.items:
                    walk(x)
            elif isinstance(o, Pair):
                walk(o.a), walk(o.b)

        while todo:
            n = todo.pop()
            if n in self.reach:
                continue
            self.reach.append(n)
            for it in self.mod.functions[n].body:
                if isinstance(it, Instr):
                    for o in it.operands:
                        walk(o)
                    if it.parts[0] == "call" and not any(isinstance(o, Sym) for o in it.operands[:2]):
                        for m in self.mod.functions.values():  # indirect: anything may be the target
                            if m.body and not m.entry:
                                todo.append(m.name)
        return used

    # ---- register file ----
    def alloc(self, size: int) -> int:
        if size == 0:
            o = self.rf
            self.rf += 32
            return o
        self.rf = align(self.rf, 32)
        o = self.rf
        self.rf += 32 * size
        return o

    def const(self, size: int, v: int) -> int:
        if size:
            v &= (1 << (8 * min(size, 8))) - 1
        key = (size, v)
        if key not in self.consts:
            self.consts[key] = self.alloc(size)
        return self.consts[key]

    def regtype(self, r: Reg) -> str:
        n = r.name
        if n.startswith("%") and n[1:] in SPEC_INDEX:
            return "u32"
        if n in ("%clock64", "%globaltimer"):
            return "u64"
        t = self.cur.regs.get(n)
        if t is None:
            if n.startswith("%"):
                return "u32"
            raise PtxError(f"unknown register {n}")
        return t

    def rsize(self, r: Reg) -> int:
        t = self.regtype(r)
        return 0 if t == "pred" else max(2, TYPE_SIZE[t])

    def reg(self, r: Reg) -> int:
        n = r.name
        key = (self.cur.name, n)
        if key in self.regmap:
            return self.regmap[key]
        if n.startswith("%") and n[1:] in SPEC_INDEX and n not in self.cur.regs:
            i = SPEC_INDEX[n[1:]]
            if self.spec[i] == NONE:
                self.spec[i] = self.alloc(4)
            return self.spec[i]
        if n == "%pm0" or n.startswith("%envreg") or n.startswith("%pm"):
            return self.const(4, 0)
        self.regmap[key] = self.alloc(self.rsize(r))
        return self.regmap[key]

    def imm_bits(self, x: Imm, typ: str) -> int:
        if x.kind == "int":
            if typ == "f32" and False:
                return x.value
            return x.value
        if x.kind == "f32":
            if typ == "f64":
                return struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", x.value))[0]))[0]
            return x.value
        if typ in ("f32", "b32", "tf32"):
            return struct.unpack("<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", x.value))[0]))[0]
        return x.value

    def symbol(self, s: Sym, addr_size: int) -> tuple:
        """(kind, value) of a symbol's address."""
        n, f = s.name, self.cur
        if f"{f.name}:{n}" in self.shared_addr:
            return "shared", self.shared_addr[f"{f.name}:{n}"] + s.offset
        if (f.name, n) in self.local_addr:
            return "local", self.local_addr[(f.name, n)] + s.offset
        if f.entry:
            for pn, _, off, _, _ in self.kparams:
                if pn == n:
                    return "kparam", off + s.offset
        if n in self.shared_addr:
            return "shared", self.shared_addr[n] + s.offset
        if n in self.var_addr:
            return "global", self.var_addr[n] + s.offset
        if n in self.fn_index:
            return "func", WIN_FUNC | self.fn_index[n]
        if n == "WARP_SZ":
            return "const", 32
        raise PtxError(f"unknown symbol {n}")

    def get(self, o: Any, size: int, typ: str = "") -> int:
        """Register-file offset of a source operand of exactly `size` bytes (0: predicate)."""
        if isinstance(o, Reg):
            if o.name == "_":
                return NONE
            if o.name in ("%clock", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi", "%clock64", "%globaltimer"):
                sz = self.rsize(o)
                t = self.alloc(sz)
                self.emit("clock64" if sz == 8 else "clock32", d=[t], s=[])
                if sz == size:
                    return t
                u = self.alloc(size)
                self.emit("mov.raw", d=[u], s=[t], m=[size, sz])
                return u
            rs = self.rsize(o)
            if rs == size or size == -1:
                return self.reg(o)
            if size == 0 or rs == 0:
                raise PtxError(f"predicate register expected or not expected: {o.name}")
            t = self.alloc(size)
            self.emit("mov.raw", d=[t], s=[self.reg(o)], m=[size, rs])
            return t
        if isinstance(o, Imm):
            if size == 0:
                return self.const(0, 1 if o.value else 0)
            return self.const(size, self.imm_bits(o, typ))
        if isinstance(o, Sym):
            kind, v = self.symbol(o, size)
            if kind == "kparam":
                t = self.alloc(8)
                self.emit("param.addr", d=[t], s=[], imm=v)
                return t
            return self.const(size, v)
        if isinstance(o, Vec) and len(o.items) == 1:
            return self.get(o.items[0], size, typ)
        raise PtxError(f"unexpected operand {o}")

    def dst(self, o: Any, size: int) -> int:
        if isinstance(o, Vec) and len(o.items) == 1:
            o = o.items[0]
        if not isinstance(o, Reg):
            raise PtxError(f"destination expected, found {o}")
        if o.name == "_":
            return self.alloc(size)
        rs = self.rsize(o)
        if rs != size and size != -1:
            t = self.alloc(size)
            self.after.append((self.reg(o), t, rs, size))
            return t
        return self.reg(o)

    # ---- emission ----
    def emit(
        self,
        op: str,
        d: list = (),
        s: list = (),
        o: list | None = None,
        m: list = (),
        imm: int = 0,
        kind: str = "normal",
        csr: int = 0x1F80,
        leader: int = 0,
        chk: int = 1,
    ) -> dict:
        i = self.ins
        oi = self.ops.setdefault(op, len(self.ops))
        ol = list(d) + list(s) if o is None else o
        row = [oi, K[kind], 0, 0, leader, i.line if i else self.cur.line, imm, csr, len(self.pool), len(ol)]
        if i and i.guard is not None:
            row[2] = 2 if i.guard.neg else 1
            row[3] = self.reg(i.guard)
        self.pool += [x & 0xFFFFFFFF for x in ol]
        mm = list(m) + [0] * (8 - len(m))
        row += [int(x) for x in mm]
        src = [x for x in s if x != NONE]
        if row[2]:
            src.append(row[3])
        dd = [x for x in d if x != NONE]
        row += [len(self.regl), len(src), len(self.regl) + len(src), len(dd), chk, 0, 0, 0]
        self.regl += src + dd
        if kind not in ("normal",):
            row[4] = 1
        if self.pending_leader:
            row[4] = 1
            self.pending_leader = False
        if kind in ("bra", "brx", "call", "callr", "ret", "exit", "trap", "bar", "warpbar", "poll"):
            self.pending_leader = True
        self.rows.append(row)
        self.meta.append(self.cur_meta)
        return {"row": row}

    def classify(self, i: Instr) -> Meta:
        p = i.parts
        op = p[0]
        op2 = ".".join(p[:2])
        cls, mem, fl = "int", "", 0
        last = p[-1]
        flt = last in ("f32", "f16", "f16x2", "bf16", "bf16x2")
        if op in ("mma", "wgmma"):
            cls = "control" if op == "wgmma" and p[1] != "mma_async" else "tensor"
            for q in p:
                if q.startswith("m") and "n" in q and "k" in q[1:] and q[1:2].isdigit():
                    mm = int(q[1 : q.index("n")])
                    n, kk = q[q.index("n") + 1 :].split("k")
                    fl = 2 * mm * int(n) * int(kk) // (4 if op == "wgmma" else 1)
        elif op in ("ldmatrix", "stmatrix", "movmatrix"):
            cls, mem = "ldmatrix", "shared_ld" if op == "ldmatrix" else "shared_st"
            if op == "movmatrix":
                mem = ""
        elif op == "cp" or op in ("cp.reduce",):
            cls, mem = "async_copy", "cp_async"
        elif op in ("ld", "ldu", "st"):
            sp = next(
                (x.split("::")[0] for x in p if x.split("::")[0] in ("global", "shared", "local", "param", "const")), "generic"
            )
            d = "ld" if op != "st" else "st"
            cls = {
                "global": "global",
                "generic": "global",
                "shared": "shared",
                "local": "local",
                "const": "int",
                "param": "int",
            }[sp]
            mem = {"global": "global_" + d, "generic": "generic_" + d, "shared": "shared_" + d, "local": "local_" + d}.get(
                sp, ""
            )
            if sp == "const":
                mem = "global_" + d
                cls = "global"
        elif op in ("atom", "red"):
            sh = any(x.startswith("shared") for x in p)
            cls, mem = ("shared", "shared_atomic") if sh else ("global", "global_atomic")
            if op == "red" and p[1] == "async":
                cls, mem = "async_copy", ""
        elif op in (
            "bra",
            "brx",
            "call",
            "ret",
            "exit",
            "trap",
            "brkpt",
            "nanosleep",
            "setmaxnreg",
            "griddepcontrol",
            "pmevent",
        ):
            cls = "control"
        elif op in ("bar", "barrier", "membar", "fence", "mbarrier"):
            cls = "barrier"
        elif op in ("shfl", "vote", "match", "redux", "activemask", "elect"):
            cls = "shuffle"
        elif op in MUFU and last != "f64":
            cls = "mufu" if "approx" in p or last != "f32" else "mufu"
        elif op == "div" and flt:
            cls = "mufu"
        elif op == "cvt":
            fl_t = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32"}
            cls = "cvt" if any(x in fl_t or "e4m3" in x or "e5m2" in x for x in p) else "int"
        elif last == "f64" and op in (FP32_OPS | MUFU):
            cls = "fp64"
        elif flt and op in FP32_OPS:
            cls = "fp32"
        elif op in ("setp", "set") and (flt or (len(p) > 2 and p[-1] in ("f32", "f16"))):
            cls = "fp32"
        elif op in ("mov", "pack"):
            cls = "mov"
        elif op in ("prefetch", "prefetchu", "discard", "createpolicy", "applypriority"):
            cls = "control"
        name = (
            i.op
            if op in ("mma", "ldmatrix", "wgmma")
            else ".".join(x for x in p if x not in ("rn", "sync", "aligned", "uni") and "::cache" not in x)
        )
        return Meta(name, i.line, i.src, cls, fl, mem)

    # ---- functions ----
    def function(self, name: str) -> None:
        f = self.cur = self.mod.functions[name]
        if not hasattr(self, "regmap"):
            self.regmap: dict = {}
            self.local_addr: dict = {}
        for key, v in f.vars.items():
            if v.space in ("local", "param") or v.space == "reg":
                al = max(v.align, v.size if v.size in (1, 2, 4, 8, 16) else 1)
                self.local = align(self.local, al)
                self.local_addr[(name, key)] = self.local
                self.local += v.size
        if not f.entry:
            for v, (off, _) in zip(f.params + f.rets, self.fn_vars[name]):
                self.local_addr[(name, v.name)] = off
            self.funcs[self.fn_index[name]][0] = len(self.rows)
        self.ins: Instr | None = None
        self.after: list = []
        self.cur_meta = Meta("(entry)", f.line, (0, 0), "control")
        self.pending_leader = True
        labels: dict = {}
        fix: list = []
        self.targets: dict = {}
        self.branch_fix = fix
        self.brx_fix: list = []
        for it in f.body:
            if isinstance(it, tuple):
                if it[0] == "label":
                    labels[it[1]] = len(self.rows)
                    self.pending_leader = True
                else:
                    self.targets[it[1]] = it[2]
                continue
            self.ins = it
            self.cur_meta = self.classify(it)
            try:
                self.lower(it)
            except PtxError as e:
                raise PtxError(f"{self.kname}: PTX line {it.line}: {it.op}: {e}") from None
            except (IndexError, KeyError, AttributeError, TypeError, ValueError) as e:
                raise PtxError(f"{self.kname}: PTX line {it.line}: cannot lower {it.op} {it.operands}: {e!r}") from e
            if self.after:
                for dreg, t, ds, ss in self.after:
                    self.emit("mov.raw", d=[dreg], s=[t], m=[ds, ss])
                self.after = []
        self.ins = None
        self.cur_meta = Meta("ret", f.line, (0, 0), "control")
        self.end_function()
        for row, lab in fix:
            if lab not in labels:
                raise PtxError(f"{name}: undefined label {lab}")
            row[6] = labels[lab]
        for k, labs in self.brx_fix:
            self.brx[k] = [labels[x] for x in labs]

    def end_function(self) -> None:
        if self.cur.entry:
            self.emit("ctl", kind="exit")
        else:
            self.emit("ctl", kind="ret", m=[self.fn_index[self.cur.name]])

    # ---- instructions ----
    def lower(self, i: Instr) -> None:
        op = i.parts[0]
        m = getattr(self, "op_" + op, None)
        if m is None:
            raise PtxError("instruction is not supported")
        m(i, i.parts, i.operands)

    @staticmethod
    def mx(p: list) -> int:
        c = 0x1F80
        for x in p:
            if x in ("rz", "rm", "rp"):
                c |= {"rz": 3, "rm": 1, "rp": 2}[x] << 13
        if "ftz" in p:
            c |= 0x8040
        return c

    def arith(self, i, p, o, name: str | None = None) -> None:
        t = p[-1]
        base = name or p[0]
        n = len(o) - 1
        if t in FLOATS:
            size = TYPE_SIZE[t]
            if base == "mad":
                base = "fma"
            half = t not in ("f32", "f64")
            mods = [int("sat" in p), int("NaN" in p), int("xorsign" in p), int("relu" in p), int("ftz" in p)]
            self.emit(
                f"{base}.{t}",
                d=[self.dst(o[0], size)],
                s=[self.get(x, size, t) for x in o[1:]],
                m=mods,
                csr=0x1F80 if half else self.mx(p),
            )
            return
        size = TYPE_SIZE[t]
        bt = {"b16": "u16", "b32": "u32", "b64": "u64"}.get(t, t)
        mods = [int("relu" in p)]
        nm = f"{base}.{bt}"
        if "sat" in p:
            nm = f"{base}.sat.{bt}"
        elif "relu" in p and bt == "s32":
            nm = f"{base}.relu.{bt}"
        if bt in ("u16x2", "s16x2"):
            size = 4
        self.emit(nm, d=[self.dst(o[0], size)], s=[self.get(x, size, t) for x in o[1:]], m=mods)

    def carry(self, i, p, o) -> None:
        t = p[-1]
        size = TYPE_SIZE[t]
        base = p[0]
        ci = int(base in ("addc", "subc"))
        self.emit(
            ("subc" if base.startswith("sub") else "addc") + (".b32" if size == 4 else ".b64"),
            d=[self.dst(o[0], size)],
            s=[self.get(x, size, t) for x in o[1:]],
            m=[ci, int("cc" in p)],
        )

    def op_add(self, i, p, o):
        if "cc" in p or p[0].endswith("c"):
            self.carry(i, p, o)
        elif p[-1] == "f32" and len(p) > 2 and p[-2] in ("f16", "bf16"):
            raise PtxError("mixed-precision add is not supported")
        else:
            self.arith(i, p, o)

    op_sub = op_addc = op_subc = op_add

    def integer_product(self, p) -> tuple[str, int, str, int]:
        """(type, its size, which part is wanted, the size of the result)."""
        size = TYPE_SIZE[p[-1]]
        part = next((x for x in p if x in ("lo", "hi", "wide")), "lo")
        return p[-1], size, part, size * 2 if part == "wide" else size

    def op_mul(self, i, p, o):
        if p[-1] in FLOATS:
            return self.arith(i, p, o)
        t, size, md, ds = self.integer_product(p)
        self.emit(f"mul.{md}.{t}", d=[self.dst(o[0], ds)], s=[self.get(x, size, t) for x in o[1:3]])

    def op_mad(self, i, p, o):
        if p[-1] in FLOATS:
            return self.arith(i, p, o)
        t, size, md, ds = self.integer_product(p)
        if "cc" in p or p[0] == "madc":
            tt = {"b32": "u32"}.get(t, t)
            return self.emit(
                f"madc.{tt}",
                d=[self.dst(o[0], size)],
                s=[self.get(x, size, t) for x in o[1:4]],
                m=[int(p[0] == "madc"), int("cc" in p), int(md == "hi")],
            )
        nm = f"mad.{md}.{t}" if "sat" not in p else f"mad.{md}.sat.{t}"
        self.emit(nm, d=[self.dst(o[0], ds)], s=[self.get(o[1], size, t), self.get(o[2], size, t), self.get(o[3], ds, t)])

    op_madc = op_mad

    def op_fma(self, i, p, o):
        if p[-1] == "f32" and len(p) > 2 and p[-2] in ("f16", "bf16"):
            raise PtxError("mixed-precision fma is not supported")
        self.arith(i, p, o)

    def op_mul24(self, i, p, o):
        self.emit(f"mul24.{p[-1]}", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:]], m=[int("hi" in p)])

    op_mad24 = lambda self, i, p, o: self.emit(
        f"mul24.{p[-1]}", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:]], m=[int("hi" in p)]
    )

    op_div = op_rem = op_min = op_max = op_neg = op_abs = op_sad = op_copysign = lambda self, i, p, o: self.arith(i, p, o)

    def unary(self, i, p, o):
        t = p[-1]
        size = TYPE_SIZE[t]
        csr = self.mx(p)
        self.emit(
            f"{p[0]}.{t}",
            d=[self.dst(o[0], size)],
            s=[self.get(o[1], size, t)],
            m=[int("sat" in p), 0, 0, 0, int("ftz" in p)],
            csr=csr,
        )

    op_rcp = op_sqrt = op_rsqrt = op_ex2 = op_lg2 = op_sin = op_cos = op_tanh = unary

    def op_testp(self, i, p, o):
        size = TYPE_SIZE[p[-1]]
        self.emit(
            f"testp.{p[-1]}",
            d=[self.dst(o[0], 0)],
            s=[self.get(o[1], size, p[-1])],
            m=[["finite", "infinite", "number", "notanumber", "normal", "subnormal"].index(p[1])],
        )

    def op_and(self, i, p, o):
        t = p[-1]
        size = TYPE_SIZE[t]
        if t == "pred":
            return self.emit(f"{p[0]}.pred", d=[self.dst(o[0], 0)], s=[self.predsrc(x) for x in o[1:]])
        self.emit(
            f"{p[0]}.{t.replace('u', 'b').replace('s', 'b')}", d=[self.dst(o[0], size)], s=[self.get(x, size, t) for x in o[1:]]
        )

    op_or = op_xor = op_not = op_cnot = op_and

    def predsrc(self, x) -> int:
        if isinstance(x, Reg) and x.neg:
            t = self.alloc(0)
            self.emit("not.pred", d=[t], s=[self.reg(x)])
            return t
        return self.get(x, 0)

    def op_shl(self, i, p, o):
        t = p[-1]
        size = TYPE_SIZE[t]
        tt = t if p[0] == "shl" else t.replace("b", "u")
        if p[0] == "shl":
            tt = "b" + t[1:]
        self.emit(f"{p[0]}.{tt}", d=[self.dst(o[0], size)], s=[self.get(o[1], size, t), self.get(o[2], 4)])

    op_shr = op_shl

    def op_lop3(self, i, p, o):
        if p[1] in ("or", "and", "xor"):
            raise PtxError("lop3 with a predicate result is not supported")
        d = o[0].a if isinstance(o[0], Pair) else o[0]
        self.emit("lop3.b32", d=[self.dst(d, 4)], s=[self.get(x, 4) for x in o[1:4]], m=[o[4].value])

    def op_shf(self, i, p, o):
        self.emit("shf.b32", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:4]], m=[int("r" in p), int("clamp" in p)])

    def op_bfe(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        self.emit(f"bfe.{p[-1]}", d=[self.dst(o[0], s)], s=[self.get(o[1], s), self.get(o[2], 4), self.get(o[3], 4)])

    def op_bfi(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        self.emit(
            f"bfi.{p[-1]}",
            d=[self.dst(o[0], s)],
            s=[self.get(o[1], s), self.get(o[2], s), self.get(o[3], 4), self.get(o[4], 4)],
        )

    def op_bmsk(self, i, p, o):
        self.emit("bmsk.b32", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:3]], m=[int("clamp" in p)])

    def op_szext(self, i, p, o):
        self.emit(f"szext.{p[-1]}", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:3]], m=[int("clamp" in p)])

    def op_prmt(self, i, p, o):
        md = ["b32", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"].index(p[-1])
        self.emit("prmt.b32", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:4]], m=[md])

    def op_popc(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        self.emit(f"{p[0]}.{p[-1]}", d=[self.dst(o[0], 4)], s=[self.get(o[1], s)], m=[0])

    op_clz = op_popc

    def op_bfind(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        self.emit(f"bfind.{p[-1]}", d=[self.dst(o[0], 4)], s=[self.get(o[1], s)], m=[int("shiftamt" in p)])

    def op_brev(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        self.emit(f"brev.{p[-1]}", d=[self.dst(o[0], s)], s=[self.get(o[1], s)])

    def op_fns(self, i, p, o):
        self.emit("fns.b32", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:4]])

    def op_dp4a(self, i, p, o):
        self.emit("dp4a", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:4]], m=[int(p[1] == "s32"), int(p[2] == "s32")])

    def op_dp2a(self, i, p, o):
        self.emit(
            "dp2a",
            d=[self.dst(o[0], 4)],
            s=[self.get(x, 4) for x in o[1:4]],
            m=[int(p[-2] == "s32"), int(p[-1] == "s32"), int("hi" in p)],
        )

    # -- predicates and selection
    def op_setp(self, i, p, o):
        t = p[-1]
        size = TYPE_SIZE[t]
        bt = {"b16": "u16", "b32": "u32", "b64": "u64"}.get(t, t)
        bop = next((x for x in p[2:] if x in ("and", "or", "xor")), None)
        cmp = CMP[p[1]]
        d, q = (o[0].a, o[0].b) if isinstance(o[0], Pair) else (o[0], None)
        dd = NONE if d.name == "_" else self.dst(d, 0)
        qq = NONE if q is None or q.name == "_" else self.dst(q, 0)
        a, b = self.get(o[1], size, t), self.get(o[2], size, t)
        c, neg = NONE, 0
        if bop:
            neg = int(getattr(o[3], "neg", False))
            c = self.get(o[3], 0)
        self.emit(
            f"setp.{bt}", d=[dd, qq], s=[a, b, c], m=[cmp, ["and", "or", "xor"].index(bop) if bop else 0, neg], csr=self.mx(p)
        )

    def op_set(self, i, p, o):
        dt, t = p[-2], p[-1]
        bop = next((x for x in p[2:] if x in ("and", "or", "xor")), None)
        size = TYPE_SIZE[t]
        ds = TYPE_SIZE[dt]
        bt = {"b16": "u16", "b32": "u32", "b64": "u64"}.get(t, t)
        om = {"f32": 1, "f16": 2, "bf16": 3, "u16": 4, "s16": 4, "f16x2": 2, "bf16x2": 3}.get(dt, 0)
        c, neg = NONE, 0
        if bop:
            neg = int(getattr(o[3], "neg", False))
            c = self.get(o[3], 0)
        d = self.dst(o[0], ds)
        a, b = self.get(o[1], size, t), self.get(o[2], size, t)
        self.emit(
            f"set.{bt}",
            d=[d],
            s=[a, b, c],
            o=[d, NONE, a, b, c],
            m=[CMP[p[1]], ["and", "or", "xor"].index(bop) if bop else 0, neg, om],
            csr=self.mx(p),
        )

    def op_selp(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        neg = int(getattr(o[3], "neg", False))
        self.emit(
            f"selp.b{8 * s}",
            d=[self.dst(o[0], s)],
            s=[self.get(o[1], s, p[-1]), self.get(o[2], s, p[-1]), self.get(o[3], 0)],
            m=[neg],
        )

    def op_slct(self, i, p, o):
        s = TYPE_SIZE[p[-2]]
        self.emit(
            f"slct.b{8 * s}.{p[-1]}",
            d=[self.dst(o[0], s)],
            s=[self.get(o[1], s, p[-2]), self.get(o[2], s, p[-2]), self.get(o[3], 4, p[-1])],
            csr=self.mx(p),
        )

    # -- moves
    def op_mov(self, i, p, o):
        t = p[-1]
        if t == "pred":
            return self.emit("mov.pred", d=[self.dst(o[0], 0)], s=[self.get(o[1], 0)])
        size = TYPE_SIZE[t]
        d, a = o
        if isinstance(d, Vec) and len(d.items) > 1:
            es = size // len(d.items)
            ds = [NONE if x.name == "_" else self.dst(x, max(2, es)) for x in d.items]
            return self.emit("unpack", d=ds, s=[self.get(a, size, t)], m=[size, es])
        if isinstance(a, Vec) and len(a.items) > 1:
            es = size // len(a.items)
            return self.emit("pack", d=[self.dst(d, size)], s=[self.get(x, max(2, es)) for x in a.items], m=[size, es])
        if isinstance(a, Sym):
            kind, v = self.symbol(a, size)
            if kind == "kparam":
                return self.emit("param.addr", d=[self.dst(d, 8)], imm=v)
        self.emit(f"mov.b{8 * size}", d=[self.dst(d, size)], s=[self.get(a, size, t)])

    def op_cvta(self, i, p, o):
        size = TYPE_SIZE[p[-1]]
        to = "to" in p
        sp = next(
            (x.split("::")[0] for x in p if x.split("::")[0] in ("shared", "local", "global", "const", "param")), "global"
        )
        m = {"shared": 1, "local": 2}.get(sp, 0)
        if isinstance(o[1], Sym):
            k, v = self.symbol(o[1], 8)
            if k == "kparam":
                m = 0
        ss = self.rsize(o[1]) if isinstance(o[1], Reg) else size
        if sp == "param" and not self.cur.entry:
            m = 2
        self.emit("cvta", d=[self.dst(o[0], size)], s=[self.get(o[1], ss)], m=[m, int(to), size, ss])

    def op_isspacep(self, i, p, o):
        m = {"global": 0, "shared": 1, "local": 2}.get(p[1].split("::")[0], 3)
        self.emit("isspacep", d=[self.dst(o[0], 0)], s=[self.get(o[1], 8)], m=[m])

    def op_mapa(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        self.emit(
            "mapa", d=[self.dst(o[0], s)], s=[self.get(o[1], s), self.get(o[2], 4)], m=[s, int("shared::cluster" not in p)]
        )

    def op_getctarank(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        self.emit("getctarank", d=[self.dst(o[0], 4)], s=[self.get(o[1], s)], m=[s, int("shared::cluster" not in p)])

    # -- conversions
    def op_cvt(self, i, p, o):
        mods = p[1:]
        if "pack" in mods:
            bits = {"u2": 2, "s2": 2, "u4": 4, "s4": 4, "u8": 8, "s8": 8, "u16": 16, "s16": 16}
            dt = next(x for x in mods if x in bits)
            return self.emit(
                "cvt.pack", d=[self.dst(o[0], 4)], s=[self.get(x, 4) for x in o[1:]], m=[bits[dt], int(dt[0] == "s")]
            )
        types = [x for x in mods if x in CTY or x in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2", "b8", "b16", "b32", "b64")]
        dt, st = types[-2], types[-1]
        fix = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64"}
        dt, st = fix.get(dt, dt), fix.get(st, st)
        rnd = next((RND[x] for x in mods if x in RND), 0)
        sat, relu, ftz = "sat" in mods, "relu" in mods, "ftz" in mods
        if dt in ("f16x2", "bf16x2") and st == "f32":
            return self.emit(
                f"cvt.{dt}.f32",
                d=[self.dst(o[0], 4)],
                s=[self.get(o[1], 4, "f32"), self.get(o[2], 4, "f32")],
                m=[rnd, int(relu), int("satfinite" in mods)],
            )
        if dt in ("e4m3x2", "e5m2x2"):
            two = st == "f32"
            return self.emit(
                "cvt.fp8x2",
                d=[self.dst(o[0], 2)],
                s=[self.get(x, 4, st) for x in o[1:]],
                m=[int(dt == "e4m3x2"), int(relu), int(not two)],
            )
        if st in ("e4m3x2", "e5m2x2"):
            return self.emit(
                "cvt.from.fp8x2",
                d=[self.dst(o[0], 4)],
                s=[self.get(o[1], 2)],
                m=[int(st == "e4m3x2"), int(relu), int(dt == "bf16x2")],
            )
        ds = max(2, TYPE_SIZE[dt])
        if isinstance(o[0], Reg) and o[0].name != "_":
            ds = self.rsize(o[0])
        ss = (
            self.rsize(o[1])
            if (isinstance(o[1], Reg) and o[1].name.startswith("%")) or isinstance(o[1], Reg)
            else max(2, TYPE_SIZE[st])
        )
        if isinstance(o[1], Reg) and o[1].name in ("%clock64", "%globaltimer"):
            ss = 8
        exact = ds == TYPE_SIZE[dt] and ss == TYPE_SIZE[st]
        ir = -1
        for x, v in (("rni", 0), ("rzi", 1), ("rmi", 2), ("rpi", 3)):
            if x in mods:
                ir = v
        d, s = self.dst(o[0], ds), self.get(o[1], ss, st)
        if exact and not sat and not relu and "satfinite" not in mods:
            name = None
            isint = lambda t: t[0] in "us"
            if isint(dt) and isint(st):
                if TYPE_SIZE[dt] == TYPE_SIZE[st]:
                    return self.emit(f"mov.b{8 * ds}", d=[d], s=[s])
                if TYPE_SIZE[dt] < TYPE_SIZE[st]:
                    name = f"cvt.fast.u{8 * TYPE_SIZE[dt]}.u{8 * TYPE_SIZE[st]}"
                else:
                    sg = st[0]
                    name = f"cvt.fast.{sg}{8 * TYPE_SIZE[dt]}.{st}"
            elif (dt, st) in (("f32", "s32"), ("f32", "u32"), ("f64", "s32")):
                name = f"cvt.fast.{dt}.{st}"
            elif (dt, st) in (("f64", "f32"), ("f32", "f64")) and ir < 0:
                name = f"cvt.fast.{dt}.{st}"
            elif (dt, st) in (("f32", "f16"), ("f32", "bf16")) and not ftz:
                name = f"cvt.fast.{dt}.{st}"
            elif (dt, st) in (("f16", "f32"), ("bf16", "f32")) and rnd == 0 and not ftz:
                name = f"cvt.fast.{dt}.{st}"
            if name in FAST_CVT:
                return self.emit(name, d=[d], s=[s], csr=self.mx(mods))
        fl = int(sat) | 2 * int(ftz) | 4 * int(relu) | 8 * int("satfinite" in mods)
        if (ir < 0 and dt[0] in "us" and st not in CTY) or (ir < 0 and dt[0] in "us"):
            ir = 1
        self.emit("cvt.any", d=[d], s=[s], m=[CTY[dt], CTY[st], rnd, ir, fl, ds, ss], csr=self.mx(mods))

    # -- memory
    def address(self, mem: Mem) -> tuple:
        """(register offset, address size, immediate, space hint)"""
        b = mem.base
        if isinstance(b, Reg):
            return self.reg(b), self.rsize(b), mem.offset, ""
        if isinstance(b, Imm):
            return self.const(8, b.value), 8, mem.offset, ""
        kind, v = self.symbol(b, 8)
        return (v, 0, mem.offset, kind) if kind == "kparam" else (self.const(8, v), 8, mem.offset, kind)

    def mem_common(self, p):
        t = next(x for x in reversed(p) if x in TYPE_SIZE)
        vec = next((int(x[1:]) for x in p if x in ("v2", "v4", "v8")), 1)
        sp = next(
            (
                SPACES[x.split("::")[0]]
                for x in p
                if (x.split("::")[0] in SPACES and x.split("::")[0] not in ("param",)) or x.startswith("param")
            ),
            0,
        )
        strong = int(any(x in ("volatile", "relaxed", "acquire", "release", "mmio") for x in p))
        return t, vec, sp, strong

    def op_ld(self, i, p, o):
        t, vec, sp, strong = self.mem_common(p)
        size = TYPE_SIZE[t]
        mem = o[1]
        dsts = o[0].items if isinstance(o[0], Vec) else [o[0]]
        rs = max([self.rsize(x) for x in dsts if x.name != "_"] + [2 if not any(x.name != "_" for x in dsts) else 0])
        d = [NONE if x.name == "_" else self.reg(x) for x in dsts]
        sx = int(t[0] == "s")
        a, asz, off, hint = self.address(mem)
        if sp == 4:
            if hint == "kparam":
                return self.emit("ld.kparam", d=d, o=[NONE] + d, m=[0, size, sx, rs], imm=a + off)
            sp = 3 if not self.cur.entry or hint == "local" else 4
        if sp in (0, 2):
            self.gran_sizes.add(size)
        self.emit("ld", d=d, s=[a], o=[a] + d, m=[sp, size, sx, rs, asz, strong, int("nc" in p)], imm=off)

    op_ldu = op_ld

    def op_st(self, i, p, o):
        t, vec, sp, strong = self.mem_common(p)
        if "async" in p:
            return self.st_async(i, p, o)
        size = TYPE_SIZE[t]
        srcs = o[1].items if isinstance(o[1], Vec) else [o[1]]
        rs = max([self.rsize(x) for x in srcs if isinstance(x, Reg)] + [0]) or max(2, size)
        s = [self.get(x, rs, t) for x in srcs]
        a, asz, off, hint = self.address(o[0])
        if sp == 4:
            sp = 3
        if sp in (0, 2):
            self.gran_sizes.add(size)
        self.emit("st", s=[a] + s, o=[a] + s, m=[sp, size, 0, rs, asz, strong], imm=off)

    def st_async(self, i, p, o):
        t = p[-1]
        size = TYPE_SIZE[t]
        srcs = o[1].items if isinstance(o[1], Vec) else [o[1]]
        s = [self.get(x, max(2, size), t) for x in srcs]
        a, asz, off, _ = self.address(o[0])
        self.emit("st", s=[a] + s, o=[a] + s, m=[2, size, 0, max(2, size), asz, 1], imm=off)
        b, bsz, boff, _ = self.address(o[2])
        c = self.const(4, size * len(srcs))
        self.emit("mbarrier.arrive", s=[b], o=[NONE, b, c], m=[bsz, 4], imm=boff)

    def op_atom(self, i, p, o):
        red = p[0] == "red"
        if red and "async" in p:
            raise PtxError("red.async is not supported")
        t = next(x for x in reversed(p) if x in ATY)
        op = next(x for x in p[1:] if x in AOP)
        vec = next((int(x[1:]) for x in p if x in ("v2", "v4", "v8")), 1)
        sp = next((SPACES[x.split("::")[0]] for x in p if x.split("::")[0] in ("global", "shared")), 0)
        size = TYPE_SIZE[t]
        k = 0
        d = [NONE] * vec
        if not red:
            ds = o[0].items if isinstance(o[0], Vec) else [o[0]]
            d = [NONE if x.name == "_" else self.dst(x, max(2, size)) for x in ds]
            k = 1
        a, asz, off, _ = self.address(o[k])
        bs = o[k + 1].items if isinstance(o[k + 1], Vec) else [o[k + 1]]
        s = [self.get(x, max(2, size), t) for x in bs]
        if op == "cas":
            s.append(self.get(o[k + 2], max(2, size), t))
        if sp in (0, 2):
            self.gran_sizes.add(size)
        self.emit("atom", d=d, s=[a] + s, o=d + [a] + s, m=[sp, AOP[op], ATY[t], vec, asz, max(2, size)], imm=off)

    op_red = op_atom

    def nop(self, i, p, o):
        self.emit("nop")

    op_membar = op_prefetch = op_prefetchu = op_discard = op_applypriority = op_nanosleep = nop
    op_setmaxnreg = op_pmevent = op_brkpt = nop

    def op_griddepcontrol(self, i, p, o):
        self.emit("griddepcontrol.wait" if "wait" in p else "nop")

    def op_fence(self, i, p, o):
        self.emit("fence.proxy" if "proxy" in p else "nop")

    def op_createpolicy(self, i, p, o):
        self.emit("mov.b64", d=[self.dst(o[0], 8)], s=[self.const(8, 0)])

    # -- warp
    def wsync(self, op, d, s, m, mask):
        mk = self.get(mask, 4)
        self.emit(op, d=d, s=s, o=list(d) + list(s) + [mk], m=m, kind="wsync")

    def op_shfl(self, i, p, o):
        d, q = (o[0].a, self.dst(o[0].b, 0)) if isinstance(o[0], Pair) else (o[0], NONE)
        mode = next(k for k, x in enumerate(("up", "down", "bfly", "idx")) if x in p)
        s = [self.get(x, 4) for x in o[1:4]]
        if "sync" in p:
            self.wsync("shfl", [self.dst(d, 4), q], s, [mode, 0], o[4])
        else:
            self.emit("shfl", d=[self.dst(d, 4), q], s=s, m=[mode])

    def op_vote(self, i, p, o):
        md = next(k for k, x in enumerate(("all", "any", "uni", "ballot")) if x in p)
        neg = int(getattr(o[1], "neg", False))
        d = self.dst(o[0], 4 if md == 3 else 0)
        self.wsync("vote", [d], [self.get(o[1], 0)], [md, neg], o[2] if len(o) > 2 else Imm(0xFFFFFFFF, "int"))

    def op_match(self, i, p, o):
        s = TYPE_SIZE[p[-1]]
        d, q = (o[0].a, self.dst(o[0].b, 0)) if isinstance(o[0], Pair) else (o[0], NONE)
        self.wsync(f"match.b{8 * s}", [self.dst(d, 4), q], [self.get(o[1], s)], [int("all" in p)], o[2])

    def op_redux(self, i, p, o):
        op = next(k for k, x in enumerate(("add", "min", "max", "and", "or", "xor")) if x in p)
        fm = (1 | 2 * int("abs" in p) | 4 * int("NaN" in p)) if p[-1] == "f32" else 0
        self.wsync("redux", [self.dst(o[0], 4)], [self.get(o[1], 4)], [op, int(p[-1] == "s32"), fm], o[2])

    def op_elect(self, i, p, o):
        d = o[0].a
        self.wsync("elect", [NONE if d.name == "_" else self.dst(d, 4), self.dst(o[0].b, 0)], [], [], o[1])

    def op_activemask(self, i, p, o):
        self.emit("activemask", d=[self.dst(o[0], 4)])

    # -- barriers
    def op_bar(self, i, p, o):
        if "warp" in p:
            return self.emit("ctl", s=[self.get(o[0], 4)], kind="warpbar")
        if "cluster" in p:
            if "arrive" in p:
                return self.emit("cluster.arrive", kind="normal")
            return self.emit("cluster.wait", kind="poll")
        md = 1 if "arrive" in p else 2 if "red" in p else 0
        aligned = int(p[0] == "bar" or "aligned" in p)
        d = NONE
        pr, neg, rop = NONE, 0, 0
        o = list(o)
        if md == 2:
            rop = 0 if "popc" in p else 1 if "and" in p else 2
            d = self.dst(o.pop(0), 4 if rop == 0 else 0)
            x = o.pop()
            neg = int(getattr(x, "neg", False))
            pr = self.get(x, 0)
        idr = cr = NONE
        bid, cnt = 0, 0
        if isinstance(o[0], Imm):
            bid = o[0].value
        else:
            bid, idr = -1, self.get(o[0], 4)
        if len(o) > 1:
            if isinstance(o[1], Imm):
                cnt = o[1].value
            else:
                cnt, cr = -1, self.get(o[1], 4)
        self.emit(
            "bar",
            d=[d] if d != NONE else [],
            s=[x for x in (pr, idr, cr) if x != NONE],
            o=[d, pr, idr, cr],
            m=[bid, md, rop, cnt, aligned, neg],
            kind="bar",
        )

    op_barrier = op_bar

    def op_mbarrier(self, i, p, o):
        k = p[1]
        if k == "init":
            a, s, off, _ = self.address(o[0])
            return self.emit("mbarrier.init", s=[a, self.get(o[1], 4)], m=[s], imm=off)
        if k == "inval":
            a, s, off, _ = self.address(o[0])
            return self.emit("mbarrier.inval", s=[a], m=[s], imm=off)
        if k in ("arrive", "arrive_drop", "expect_tx", "complete_tx"):
            d, q = NONE, list(o)
            if not isinstance(q[0], Mem):
                x = q.pop(0)
                d = NONE if isinstance(x, Reg) and x.name == "_" else self.dst(x, 8)
            a, s, off, _ = self.address(q[0])
            c = self.get(q[1], 4) if len(q) > 1 else NONE
            fl = (
                (1 if "expect_tx" in p else 0)
                | (2 if k == "expect_tx" else 0)
                | (4 if k == "complete_tx" else 0)
                | (8 if k == "arrive_drop" else 0)
            )
            return self.emit("mbarrier.arrive", d=[d], s=[a, c], o=[d, a, c], m=[s, fl], imm=off)
        if k in ("try_wait", "test_wait"):
            a, s, off, _ = self.address(o[1])
            par = int("parity" in p)
            v = self.get(o[2], 4 if par else 8)
            return self.emit(
                "mbarrier.wait", d=[self.dst(o[0], 0)], s=[a, v], m=[s, par, int(k == "try_wait")], imm=off, kind="poll"
            )
        if k == "pending_count":
            return self.emit("mbarrier.pending_count", d=[self.dst(o[0], 4)], s=[self.get(o[1], 8)])
        raise PtxError(f"mbarrier.{k} is not supported")

    # -- asynchronous copies
    def op_cp(self, i, p, o):
        if p[1] == "reduce" or "bulk" in p:
            return self.bulk(i, p, o)
        if "mbarrier" in p:
            a, s, off, _ = self.address(o[0])
            return self.emit("cp.async.mbarrier", s=[a], m=[s, int("noinc" in p)], imm=off)
        if "commit_group" in p:
            return self.emit("cp.async.commit")
        if "wait_group" in p:
            return self.emit("cp.async.wait", m=[o[0].value, 0])
        if "wait_all" in p:
            return self.emit("cp.async.wait", m=[0, 1])
        d, ds, doff, _ = self.address(o[0])
        s, ss, soff, _ = self.address(o[1])
        n = o[2].value
        sz, ign, extra = NONE, 0, []
        rest = o[3:]
        if any("cache_hint" in x for x in p):
            rest = rest[:-1]
        if rest:
            if isinstance(rest[0], Reg) and self.rsize(rest[0]) == 0:
                ign, extra = 1, [self.get(rest[0], 0)]
            else:
                sz = self.get(rest[0], 4)
        if ss != 8:
            raise PtxError("cp.async with a 32-bit global address")
        self.emit(
            "cp.async", s=[d, s] + ([sz] if sz != NONE else []) + extra, o=[d, s, sz] + extra, m=[n, ds, ss, ign, doff, soff]
        )

    def off_reg(self, a, size, off):
        if not off:
            return a, size
        t = self.alloc(size)
        self.emit("add.u64" if size == 8 else "add.u32", d=[t], s=[a, self.const(size, off)])
        return t, size

    def maddr(self, mem):
        a, s, off, _ = self.address(mem)
        return self.off_reg(a, s, off)

    def bulk(self, i, p, o):
        if "commit_group" in p:
            return self.emit("cp.async.bulk.commit")
        if "wait_group" in p:
            return self.emit("cp.async.bulk.wait", m=[o[0].value])
        if "prefetch" in p:
            return self.emit("nop")
        red, rty = 0, 0
        if p[1] == "reduce":
            red = 1 + ["add", "min", "max", "inc", "dec", "and", "or", "xor"].index(
                next(x for x in p if x in ("add", "min", "max", "inc", "dec", "and", "or", "xor"))
            )
            rty = TMTY.get(p[-1], 0)
        spaces = [x for x in p if x.startswith("shared") or x == "global"]
        to_global = spaces[0] == "global"
        o = list(o)
        if any("cache_hint" in x for x in p):
            o.pop()
        cm = NONE
        if any("multicast" in x for x in p):
            x = o.pop()
            cm = self.get(x, 2)
        if "tensor" in p:
            if "tile" not in p and any(x.startswith("im2col") for x in p):
                raise PtxError("im2col tensor copies are not supported")
            if to_global:
                tm, sm, mb = o[0], o[1], None
            else:
                sm, tm, mb = o[0], o[1], o[2]
            rank = int(next(x for x in p if len(x) == 2 and x[1] == "d" and x[0].isdigit())[0])
            co = tm.extra[0].items if isinstance(tm.extra[0], Vec) else tm.extra
            coords = [self.get(x, 4) for x in co]
            ta, tsz = self.maddr(Mem(tm.base, tm.offset))
            if tsz == 0:
                ta = self.alloc(8)
                self.emit("param.addr", d=[ta], imm=self.symbol(tm.base, 8)[1] + tm.offset)
            sa, ssz = self.maddr(sm)
            ma, msz = self.maddr(mb) if mb else (NONE, 8)
            return self.emit(
                "cp.async.bulk.tensor",
                s=[x for x in [sa, ta, ma, cm] + coords if x != NONE],
                o=[sa, ta, ma, cm] + coords,
                m=[int(to_global), ssz, rank, msz, red],
            )
        d, dsz = self.maddr(o[0])
        s, ssz = self.maddr(o[1])
        n = self.get(o[2], 4)
        ma, msz = self.maddr(o[3]) if len(o) > 3 and isinstance(o[3], Mem) else (NONE, 8)
        dr = 1 if to_global else 0 if "global" in spaces else 2
        self.emit(
            "cp.async.bulk", s=[x for x in (d, s, n, ma, cm) if x != NONE], o=[d, s, n, ma, cm], m=[dr, dsz, ssz, msz, red, rty]
        )

    def op_tensormap(self, i, p, o):
        if p[1] == "cp_fenceproxy":
            a, asz = self.maddr(o[0])
            b, bsz = self.maddr(o[1])
            return self.emit("tensormap.cp", s=[a, b], m=[asz, bsz])
        fields = [
            "global_address",
            "rank",
            "box_dim",
            "global_dim",
            "global_stride",
            "element_stride",
            "elemtype",
            "interleave_layout",
            "swizzle_mode",
            "fill_mode",
        ]
        f = next(k for k, x in enumerate(fields) if x in p)
        a, asz = self.maddr(o[0])
        vs = TYPE_SIZE[p[-1]]
        if f in (2, 3, 4, 5):
            k, v = o[1].value, self.get(o[2], vs)
        else:
            k, v = 0, self.get(o[1], vs)
        self.emit("tensormap.replace", s=[a, v], m=[f, k, asz, vs, int("shared::cta" in p)])

    # -- matrices
    def op_ldmatrix(self, i, p, o):
        if "b16" not in p or "m8n8" not in p:
            raise PtxError("only ldmatrix .m8n8 .b16 is supported")
        a, s, off, _ = self.address(o[1])
        d = [self.dst(x, 4) for x in (o[0].items if isinstance(o[0], Vec) else [o[0]])]
        self.emit("ldmatrix", d=d, s=[a], o=[a] + d, m=[int("trans" in p), s], imm=off, kind="aligned")

    def op_stmatrix(self, i, p, o):
        if "m16n8" in p:
            raise PtxError("stmatrix .m16n8 is not supported")
        a, s, off, _ = self.address(o[0])
        d = [self.get(x, 4) for x in (o[1].items if isinstance(o[1], Vec) else [o[1]])]
        self.emit("stmatrix", s=[a] + d, m=[int("trans" in p), s], imm=off, kind="aligned")

    def op_movmatrix(self, i, p, o):
        self.emit("movmatrix", d=[self.dst(o[0], 4)], s=[self.get(o[1], 4)], kind="aligned")

    def op_mma(self, i, p, o):
        if "sp" in p or any(x.startswith("sp::") for x in p) or "kind" in ".".join(p):
            raise PtxError("sparse and block-scaled mma are not supported")
        shape = next(x for x in p if x[0] == "m" and x[1:2].isdigit())
        m, rest = shape[1:].split("n")
        n, k = rest.split("k")
        types = [
            x for x in p if x in ("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "f32", "s32", "f64", "s4", "u4", "b1")
        ]
        if types[-4:] == ["f64"] * 4:
            if shape != "m8n8k4":
                raise PtxError("only m8n8k4 f64 mma is supported")
            regs = [[self.get(x, 8) for x in (v.items if isinstance(v, Vec) else [v])] for v in o]
            return self.emit("mma.f64", d=regs[0], s=regs[1] + regs[2] + regs[3], kind="aligned")
        dt, at, bt, ct = types[-4:]
        if at in ("s4", "u4", "b1") or (m, n) not in (("16", "8"), ("8", "8")) or (m == "8" and at not in ("s8", "u8")):
            raise PtxError(f"mma shape {shape} with {at} is not supported")
        if dt != ct:
            raise PtxError("mma with different C and D types is not supported")
        get = lambda v: [self.get(x, 4) for x in (v.items if isinstance(v, Vec) else [v])]
        d = [self.dst(x, 4) for x in (o[0].items if isinstance(o[0], Vec) else [o[0]])]
        s = get(o[1]) + get(o[2]) + get(o[3])
        self.emit(
            "mma",
            d=d,
            s=s,
            m=[MTY[at], MTY[bt], int(k), int(ct == "f16"), int(dt == "f16"), int("satfinite" in p), int(m)],
            kind="aligned",
        )

    def op_wgmma(self, i, p, o):
        k = p[1]
        if k == "fence":
            return self.emit("nop", kind="aligned")
        if k == "commit_group":
            return self.emit("wgmma.commit", kind="aligned")
        if k == "wait_group":
            return self.emit("wgmma.wait", m=[o[0].value], kind="aligned")
        if "sp" in p:
            raise PtxError("sparse wgmma is not supported")
        shape = next(x for x in p if x.startswith("m64n"))
        n, kk = shape[4:].split("k")
        types = [x for x in p if x in ("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "f32", "s32")]
        dt, at, bt = types[0], types[1], types[2]
        d = [self.dst(x, 4) for x in o[0].items]
        areg = isinstance(o[1], Vec)
        a = [self.get(x, 4) for x in o[1].items] if areg else [self.get(o[1], 8)]
        b = self.get(o[2], 8)
        rest = o[3:]
        pr = self.const(0, 1)
        if rest:
            x = rest.pop(0)
            pr = self.predsrc(x) if isinstance(x, Reg) else self.const(0, 1 if x.value else 0)
        im = [x.value for x in rest]
        sa, sb = (im[0], im[1]) if len(im) >= 2 else (1, 1)
        tr = 0
        t = im[2:]
        if len(t) == 2:
            tr = t[0] | t[1] << 1
        elif len(t) == 1:
            tr = t[0] << 1
        sg = (1 if sa == -1 else 0) | (2 if sb == -1 else 0)
        self.emit(
            "wgmma",
            d=d,
            s=a + [b, pr],
            m=[MTY[at], int(kk), int(n), int(areg) | 2 * int(dt == "f16") | 4 * int(dt == "s32"), sg, tr, MTY[bt]],
            kind="aligned",
            chk=2,
        )

    # -- control
    def op_bra(self, i, p, o):
        e = self.emit("ctl", kind="bra")
        self.branch_fix.append((e["row"], o[0].name))

    def op_brx(self, i, p, o):
        name = o[1].name
        k = len(self.brx)
        self.brx.append([])
        self.brx_fix.append((k, self.targets.get(name) or self.find_targets(name)))
        self.emit("ctl", s=[self.get(o[0], 4)], m=[k], kind="brx")

    def find_targets(self, name):
        for it in self.cur.body:
            if isinstance(it, tuple) and it[0] == "targets" and it[1] == name:
                return it[2]
        raise PtxError(f"unknown branch targets {name}")

    def op_ret(self, i, p, o):
        self.end_function()

    def op_exit(self, i, p, o):
        self.emit("ctl", kind="exit")

    def op_trap(self, i, p, o):
        self.emit("ctl", kind="trap")

    def slot(self, x) -> tuple:
        """Local-memory (offset, size) of a call argument; register arguments are spilled."""
        if isinstance(x, Sym):
            key = (self.cur.name, x.name)
            return self.local_addr[key]
        size = max(2, self.rsize(x)) if isinstance(x, Reg) else 4
        self.local = align(self.local, size)
        off = self.local
        self.local += size
        return off

    def op_call(self, i, p, o):
        o = list(o)
        rets = o.pop(0).items if isinstance(o[0], Paren) else []
        target = o.pop(0)
        args = o.pop(0).items if o and isinstance(o[0], Paren) else []
        name = target.name if isinstance(target, Sym) else None
        a = [self.slot(x) for x in args]
        r = [self.slot(x) for x in rets]
        if name == "vprintf":
            return self.emit("vprintf", m=[a[0], a[1], r[0] if r else -1])
        if name == "__assertfail":
            return self.emit("assertfail", m=a[:3])
        for x, off in zip(args, a):
            if not isinstance(x, Sym):
                sz = max(2, self.rsize(x)) if isinstance(x, Reg) else 4
                g = self.get(x, sz)
                c = self.const(8, off)
                self.emit("st", s=[c, g], m=[3, sz, 0, sz, 8, 0])
        if name is not None and name not in self.fn_index:
            raise PtxError(f"call of {name}, which has no body here")
        if name is not None:
            self.emit("ctl", o=a + r, m=[len(a), len(r)], imm=self.fn_index[name], kind="call")
        else:
            t = self.get(target, 8)
            self.emit("ctl", s=[t], o=[t] + a + r, m=[len(a), len(r)], kind="callr")
        for x, off in zip(rets, r):
            if not isinstance(x, Sym):
                sz = self.rsize(x)
                c = self.const(8, off)
                d = self.reg(x)
                self.emit("ld", d=[d], s=[c], o=[c, d], m=[3, sz, 0, sz, 8, 0])


FAST_CVT = {
    "cvt.fast.u64.u32",
    "cvt.fast.s64.s32",
    "cvt.fast.u32.u64",
    "cvt.fast.u32.u16",
    "cvt.fast.s32.s16",
    "cvt.fast.u16.u32",
    "cvt.fast.u64.u16",
    "cvt.fast.u16.u64",
    "cvt.fast.s64.s16",
    "cvt.fast.f32.s32",
    "cvt.fast.f32.u32",
    "cvt.fast.f64.f32",
    "cvt.fast.f64.s32",
    "cvt.fast.f32.f64",
    "cvt.fast.f32.f16",
    "cvt.fast.f32.bf16",
    "cvt.fast.f16.f32",
    "cvt.fast.bf16.f32",
}


def lower(mod: Module, kernel: str, var_addr: dict) -> Lowered:
    return Lowerer(mod, kernel, var_addr).run()
