"""PTX text to a small syntax tree."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import Any


class PtxError(Exception):
    """The PTX text cannot be parsed or lowered."""


TYPE_SIZE = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
    "pred": 0,
    "e4m3x2": 2,
    "e5m2x2": 2,
    "u16x2": 4,
    "s16x2": 4,
    "e4m3": 1,
    "e5m2": 1,
}

# --- operands ---------------------------------------------------------------------------------


@dataclass
class Reg:
    name: str
    neg: bool = False  # !p


@dataclass
class Imm:
    value: Any  # int, or float bits
    kind: str  # 'int', 'f32', 'f64', 'dec'


@dataclass
class Vec:
    items: list


@dataclass
class Mem:
    base: Any  # Reg, Sym or Imm
    offset: int = 0
    extra: list = field(default_factory=list)  # tensor coordinates and such


@dataclass
class Sym:
    name: str
    offset: int = 0


@dataclass
class Pair:
    a: Any
    b: Any


@dataclass
class Paren:
    items: list


@dataclass
class Instr:
    op: str
    operands: list
    guard: Reg | None
    line: int
    src: tuple = (0, 0)
    parts: list = field(default_factory=list)


@dataclass
class Var:
    space: str
    name: str
    type: str
    align: int
    size: int  # bytes; 0 for an extern array
    init: list | None = None
    extern: bool = False
    ptr_space: str = ""


@dataclass
class Function:
    name: str
    entry: bool
    params: list
    rets: list
    body: list = field(default_factory=list)  # Instr, ('label', name), ('targets', name, list)
    regs: dict = field(default_factory=dict)  # name -> type
    vars: dict = field(default_factory=dict)  # local/shared/param variables
    directives: dict = field(default_factory=dict)
    line: int = 0


@dataclass
class Module:
    functions: dict
    variables: dict
    files: dict
    target: str = ""
    version: str = ""


TOKEN = re.compile(
    r"""
    (?P<ws>[ \t\r]+)|(?P<nl>\n)
  |(?P<str>"(?:[^"\\]|\\.)*")
  |(?P<num>0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}|0[xX][0-9A-Fa-f]+U?|0[bB][01]+U?|\d+\.\d*(?:[eE][+-]?\d+)?|\d+U?)
  |(?P<id>[.%$_A-Za-z][\w$%]*(?:(?:\.|::)[\w$]+)*)
  |(?P<p>[{}\[\](),;:@!|+\-=<>*])
""",
    re.X,
)


def _strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def tokenize(text: str) -> list:
    text = _strip_comments(text)
    cut = re.search(r"^\s*\.section\b", text, re.M)  # debug sections come last
    if cut and not re.search(r"\.(entry|func)\b", text[cut.start() :]):
        text = text[: cut.start()]
    toks, line, pos, n = [], 1, 0, len(text)
    while pos < n:
        m = TOKEN.match(text, pos)
        if not m:
            raise PtxError(f"line {line}: unexpected character {text[pos]!r}")
        pos = m.end()
        k = m.lastgroup
        if k == "nl":
            line += 1
        elif k != "ws":
            toks.append((k, m.group(k), line))
    toks.append(("eof", "", line))
    return toks


def number(t: str) -> Imm:
    if t[:2] in ("0f", "0F"):
        return Imm(int(t[2:], 16), "f32")
    if t[:2] in ("0d", "0D"):
        return Imm(int(t[2:], 16), "f64")
    if "." in t:
        return Imm(struct.unpack("<Q", struct.pack("<d", float(t)))[0], "f64")
    return Imm(
        int(t.rstrip("U"), 0)
        if not (t.startswith("0") and t.rstrip("U").isdigit() and len(t.rstrip("U")) > 1)
        else int(t.rstrip("U"), 8),
        "int",
    )


class Parser:
    def __init__(self, text: str):
        self.t = tokenize(text)
        self.i = 0
        self.mod = Module({}, {}, {})

    # token access
    def peek(self, k: int = 0) -> str:
        return self.t[self.i + k][1]

    def next(self) -> str:
        v = self.t[self.i][1]
        self.i += 1
        return v

    def expect(self, v: str) -> None:
        if self.peek() != v:
            raise PtxError(f"line {self.t[self.i][2]}: expected {v!r}, found {self.peek()!r}")
        self.i += 1

    def accept(self, v: str) -> bool:
        if self.peek() == v and self.t[self.i][0] != "str":
            self.i += 1
            return True
        return False

    def skip_line(self) -> None:
        ln = self.t[self.i][2]
        while self.t[self.i][2] == ln and self.t[self.i][0] != "eof":
            self.i += 1

    # --- module ---
    def parse(self) -> Module:
        while self.t[self.i][0] != "eof":
            v = self.peek()
            if v == ".version":
                self.next()
                self.mod.version = self.next()
            elif v == ".target":
                ln = self.t[self.i][2]
                self.next()
                self.mod.target = self.next()
                while self.t[self.i][2] == ln:
                    self.i += 1
            elif v == ".address_size":
                self.i += 2
            elif v == ".file":
                self.file_directive()
            elif v in (".loc", ".pragma", ".alias"):
                self.skip_line()
            elif v == ".section":
                self.i += 2
                self.skip_braces()
            elif v == ";":
                self.next()
            else:
                self.declaration()
        return self.mod

    def file_directive(self) -> None:
        ln = self.t[self.i][2]
        self.next()
        n = int(self.next())
        self.mod.files[n] = self.next().strip('"')
        while self.t[self.i][2] == ln and self.t[self.i][0] != "eof":
            self.i += 1

    def skip_braces(self) -> None:
        self.expect("{")
        d = 1
        while d:
            v = self.next()
            d += v == "{"
            d -= v == "}"

    def declaration(self) -> None:
        extern = False
        while self.peek() in (".visible", ".extern", ".weak", ".common", ".noreturn", ".hidden"):
            extern |= self.next() == ".extern"
        v = self.peek()
        if v in (".entry", ".func"):
            self.function(extern)
        elif v in (".global", ".const", ".shared", ".local", ".param", ".tex"):
            for x in self.variable(extern):
                self.mod.variables[x.name] = x
        else:
            raise PtxError(f"line {self.t[self.i][2]}: unexpected {v!r}")

    def variable(self, extern: bool = False, param: bool = False) -> list:
        space = self.next()[1:]
        align, typ, vec, ptr = 0, "", 1, ""
        while self.peek().startswith("."):
            v = self.next()[1:]
            if v == "align":
                align = int(self.next())
            elif v in ("v2", "v4", "v8"):
                vec = int(v[1:])
            elif v == "ptr":
                while self.peek() in (".global", ".shared", ".const", ".local", ".generic", ".param"):
                    ptr = self.next()[1:]
                if self.accept(".align"):
                    self.next()
            elif v in TYPE_SIZE:
                typ = v
            elif v in ("attribute", "managed", "unified"):
                if self.peek() == "(":
                    while self.next() != ")":
                        pass
        out = []
        while True:
            name = self.next()
            count, arr = 1, False
            if self.accept("<"):  # parameterised names
                k = int(self.next())
                self.expect(">")
                for j in range(k):
                    out.append(Var(space, f"{name}{j}", typ, align or TYPE_SIZE[typ], TYPE_SIZE[typ] * vec))
                if not self.accept(","):
                    break
                continue
            while self.accept("["):
                arr = True
                if self.peek() == "]":
                    count = 0
                else:
                    count *= int(self.next(), 0)
                self.expect("]")
            init = None
            if self.accept("="):
                init = self.initialiser()
            sz = TYPE_SIZE.get(typ, 1) * vec
            if arr and count == 0 and init:
                count = len(init)
            out.append(Var(space, name, typ, align or max(1, sz), sz * count, init, extern, ptr))
            if param or not self.accept(","):
                break
        if not param:
            self.expect(";")
        return out

    def initialiser(self) -> list:
        if self.accept("{"):
            out: list = []
            while not self.accept("}"):
                if self.accept(","):
                    continue
                out.extend(self.initialiser())
            return out
        neg = self.accept("-")
        k, v, _ = self.t[self.i]
        self.i += 1
        if k == "num":
            x = number(v)
            if neg:
                x = Imm(-x.value, x.kind) if x.kind == "int" else x
            return [x]
        if v == "generic":
            self.expect("(")
            s = Sym(self.next())
            self.expect(")")
        else:
            s = Sym(v)
        if self.accept("+"):
            s.offset = int(self.next(), 0)
        elif self.accept("-"):
            s.offset = -int(self.next(), 0)
        return [("generic" if v == "generic" else "sym", s)]

    # --- functions ---
    def params(self) -> list:
        out: list = []
        self.expect("(")
        while not self.accept(")"):
            if self.accept(","):
                continue
            if self.peek() == ".reg":
                self.next()
                typ = self.next()[1:]
                out.append(Var("reg", self.next(), typ, TYPE_SIZE[typ], TYPE_SIZE[typ]))
            else:
                out.extend(self.variable(param=True))
        return out

    def function(self, extern: bool) -> None:
        line = self.t[self.i][2]
        entry = self.next() == ".entry"
        rets: list = []
        if not entry and self.peek() == "(":
            rets = self.params()
        name = self.next()
        params = self.params() if self.peek() == "(" else []
        f = Function(name, entry, params, rets, line=line)
        while self.peek() not in ("{", ";"):
            d = self.next()
            vals = []
            while self.t[self.i][0] == "num" or self.peek() == ",":
                if self.peek() != ",":
                    vals.append(int(self.peek(), 0))
                self.next()
            if d == ".pragma":
                self.next()
                self.accept(";")
            f.directives[d.lstrip(".")] = vals
        if self.accept(";"):
            self.mod.functions.setdefault(name, f)
            return
        self.expect("{")
        self.loc = (0, 0)
        self.uniq = 0
        self.plain: set = set()
        self.body(f, [{}])
        self.mod.functions[name] = f

    def body(self, f: Function, scopes: list) -> None:
        while True:
            k, v, line = self.t[self.i]
            if v == "}" and k == "p":
                self.i += 1
                return
            if v == "{" and k == "p":
                self.i += 1
                self.body(f, scopes + [self.scope_labels()])
                continue
            if v == ".reg":
                self.reg_decl(f, scopes)
            elif v == ".loc":
                self.i += 1
                a = int(self.next())
                b = int(self.next())
                self.loc = (a, b)
                while self.t[self.i][2] == line:
                    self.i += 1
            elif v in (".pragma", ".file"):
                if v == ".file":
                    self.file_directive()
                else:
                    while self.next() != ";":
                        pass
            elif v in (".local", ".shared", ".param", ".global", ".const"):
                for x in self.variable():
                    if x.name in f.vars or len(scopes) > 1:
                        self.uniq += 1
                        new = f"{x.name}#{self.uniq}"
                        scopes[-1][x.name] = new
                        x.name = new
                    f.vars[x.name] = x
            elif v in (".extern", ".weak", ".visible"):
                self.i += 1
            elif k == "id" and self.peek(1) == ":":
                self.i += 2
                v = self.name(v, scopes)
                nxt = self.peek()
                if nxt == ".branchtargets":
                    self.i += 1
                    targets = []
                    while not self.accept(";"):
                        if not self.accept(","):
                            targets.append(self.name(self.next(), scopes))
                    f.body.append(("targets", v, targets))
                elif nxt in (".callprototype", ".calltargets"):
                    while self.next() != ";":
                        pass
                else:
                    f.body.append(("label", v))
            elif v == ";":
                self.i += 1
            else:
                f.body.append(self.instr(scopes))

    def reg_decl(self, f: Function, scopes: list) -> None:
        self.next()
        typ = self.next()[1:]
        if typ in ("v2", "v4"):
            typ = self.next()[1:]
        while True:
            name = self.next()
            names = [name]
            if self.accept("<"):
                n = int(self.next())
                self.expect(">")
                names = [f"{name}{j}" for j in range(n)]
            for nm in names:
                key = nm
                if len(scopes) > 1:
                    self.uniq += 1
                    key = f"{nm}#{self.uniq}"
                if len(scopes) > 1 or not nm.startswith("%"):
                    scopes[-1][nm] = key
                f.regs[key] = typ
                self.plain.add(key)
            if not self.accept(","):
                break
        self.expect(";")

    # --- instructions ---
    def name(self, v: str, scopes: list) -> str:
        for s in reversed(scopes):
            if v in s:
                return s[v]
        return v

    def instr(self, scopes: list) -> Instr:
        guard = None
        if self.accept("@"):
            neg = self.accept("!")
            guard = Reg(self.name(self.next(), scopes), neg)
        k, op, line = self.t[self.i]
        if k != "id":
            raise PtxError(f"line {line}: expected an instruction, found {op!r}")
        self.i += 1
        ops = []
        while not self.accept(";"):
            if self.accept(","):
                continue
            ops.append(self.operand(scopes))
        return Instr(op, ops, guard, line, self.loc, op.split("."))

    def operands_until(self, closing: str, scopes: list) -> list:
        """What stands between the bracket here and `closing`."""
        self.i += 1
        items = []
        while not self.accept(closing):
            if not self.accept(","):
                items.append(self.operand(scopes))
        return items

    def operand(self, scopes: list):
        k, v, line = self.t[self.i]
        if v == "{":
            return Vec(self.operands_until("}", scopes))
        if v == "[":
            self.i += 1
            base = self.operand(scopes)
            off = 0
            extra = []
            if isinstance(base, Sym):
                off, base.offset = base.offset, 0
            while not self.accept("]"):
                if self.accept("+"):
                    sg = -1 if self.accept("-") else 1
                    off += sg * number(self.next()).value
                elif self.accept("-"):
                    off -= number(self.next()).value
                elif self.accept(","):
                    extra.append(self.operand(scopes))
                else:
                    raise PtxError(f"line {line}: bad address")
            return Mem(base, off, extra)
        if v == "(":
            return Paren(self.operands_until(")", scopes))
        if v == "!":
            self.i += 1
            r = self.operand(scopes)
            r.neg = True
            return r
        if v == "-":
            self.i += 1
            x = number(self.next())
            if x.kind == "int":
                x.value = -x.value
            elif x.kind == "f32":
                x.value ^= 1 << 31
            else:
                x.value ^= 1 << 63
            return x
        self.i += 1
        if k == "num":
            return number(v)
        if k != "id":
            raise PtxError(f"line {line}: unexpected {v!r}")
        v = self.name(v, scopes)
        r: Any
        if v.startswith("%") or v == "_" or v in self.plain:
            r = Reg(v)
        else:
            r = Sym(v)
            if self.peek() == "+" and self.t[self.i + 1][0] == "num":
                self.i += 1
                r.offset = int(self.next(), 0)
        if self.accept("|"):
            return Pair(r, self.operand(scopes))
        return r

    def scope_labels(self) -> dict:
        """Labels declared directly in the scope that starts here get unique names."""
        d, j, out = 1, self.i, {}
        while d and self.t[j][0] != "eof":
            v = self.t[j][1]
            d += v == "{"
            d -= v == "}"
            if d == 1 and self.t[j][0] == "id" and self.t[j + 1][1] == ":":
                self.uniq += 1
                out[v] = f"{v}#{self.uniq}"
            j += 1
        return out


def parse(text: str) -> Module:
    return Parser(text).parse()
