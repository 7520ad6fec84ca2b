"""Machine-code statistics of a cubin: registers, spills, stack, shared memory and instruction mix.

    python -m ptx_emulator.sass FILE.cubin|FILE.o|FILE.ptx [--json] [--arch sm_80] [--kernel NAME]

Uses the cuobjdump, nvdisasm and ptxas programs of the triton wheel (or of PATH).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GROUPS = [
    ("tensor", r"^(HMMA|HGMMA|IMMA|IGMMA|DMMA|QGMMA|BMMA)"),
    ("fp32", r"^(FFMA|FADD|FMUL|FMNMX|FSETP|FSEL|FSET|FCHK|FSWZADD)"),
    ("fp16", r"^(HFMA2|HADD2|HMUL2|HSETP2|HMNMX2|HSET2)"),
    ("fp64", r"^D(FMA|ADD|MUL|SETP)"),
    ("mufu", r"^MUFU"),
    ("conversion", r"^(F2F|F2I|I2F|F2FP|FRND|I2FP|I2I)"),
    ("ldmatrix", r"^(LDSM|STSM|MOVM)"),
    ("shared", r"^(LDS|STS|ATOMS)"),
    ("async copy", r"^(LDGSTS|UBLKCP|UTMALDG|UTMASTG|LDGDEPBAR|UTMACMDFLUSH)"),
    ("global", r"^(LDG|STG|LD|ST|ATOMG|RED|ATOM)$"),
    ("local", r"^(LDL|STL)"),
    ("constant", r"^(LDC|ULDC|LDCU)"),
    ("shuffle", r"^(SHFL|VOTE|MATCH|REDUX)"),
    ("barrier", r"^(BAR|DEPBAR|MEMBAR|WARPSYNC|SYNCS|ERRBAR|FENCE|CCTL|WARPGROUP)"),
    ("control", r"^(BRA|EXIT|RET|CALL|BSSY|BSYNC|BRX|NOP|BREAK|JMP|YIELD|NANOSLEEP|BPT)"),
    ("uniform", r"^U"),
    ("moves", r"^(MOV|SEL|S2R|CS2R|S2UR|R2UR|PRMT|P2R|R2P|PLOP3)"),
    ("integer", r"."),
]


def tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        p = Path(list(spec.submodule_search_locations)[0]) / "backends" / "nvidia" / "bin" / name
        if p.exists():
            return str(p)
    p2 = shutil.which(name)
    if p2:
        return p2
    raise FileNotFoundError(f"{name} was found neither in the triton wheel nor on PATH")


def group(op: str) -> str:
    base = op.split(".")[0]
    return next(g for g, pat in GROUPS if re.search(pat, base))


def mix(ops: list) -> dict:
    out: dict = {}
    for o in ops:
        g = group(o)
        out[g] = out.get(g, 0) + 1
    return dict(sorted(out.items(), key=lambda x: -x[1]))


INSN = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_x?_?\w+|\.L\w+):")
TARGET = re.compile(r"`\((\.L\w+)\)")


def analyse_text(lines: list) -> dict:
    insns: list = []
    labels: dict = {}
    for ln in lines:
        m = LABEL.match(ln.strip())
        if m:
            labels[m.group(1)] = len(insns)
            continue
        m = INSN.match(ln)
        if m:
            insns.append((int(m.group(1), 16), m.group(2), m.group(3)))
    addr = {a: k for k, (a, _, _) in enumerate(insns)}
    loops = []
    for k, (_, op, rest) in enumerate(insns):
        if op.startswith("BRA"):
            t = TARGET.search(rest)
            dst = labels.get(t.group(1)) if t else None
            if dst is None:
                h = re.search(r"0x([0-9a-f]+)", rest)
                dst = addr.get(int(h.group(1), 16)) if h else None
            if dst is not None and dst < k:
                loops.append((dst, k))
    ops = [o for _, o, _ in insns]
    while ops and ops[-1].startswith(("NOP", "BRA")):
        ops.pop()
    tens = re.compile(r"^(HMMA|HGMMA|IMMA|IGMMA|QGMMA|DMMA)")
    # innermost loops first: a loop that contains another one is judged without it
    inner = [l for l in loops if not any(o != l and l[0] <= o[0] and o[1] <= l[1] for o in loops)]
    best, hot = None, {}
    for a, b in inner:
        body = [o for _, o, _ in insns[a : b + 1]]
        key = (sum(bool(tens.match(o)) for o in body), len(body))
        if best is None or key > best:
            best, hot = (
                key,
                {
                    "start": hex(insns[a][0]),
                    "end": hex(insns[b][0]),
                    "instructions": len(body),
                    "tensor": key[0],
                    "mix": mix(body),
                },
            )
    return {
        "instructions": len(ops),
        "mix": mix(ops),
        "loops": len(loops),
        "hot_loop": hot,
        "spill_stores": sum(o.startswith("STL") for o in ops),
        "spill_loads": sum(o.startswith("LDL") for o in ops),
    }


def analyse(path: str, arch: str = "sm_80") -> dict:
    """Per kernel: registers, stack, shared memory, local stores and loads (spills), instruction mix, hottest loop."""
    with tempfile.TemporaryDirectory() as td:
        p = Path(path)
        if p.suffix == ".ptx":
            m = re.search(r"\.target\s+(\w+)", p.read_text())
            out = Path(td) / "a.cubin"
            msg = ""
            for name in ("ptxas", "ptxas-blackwell"):  # the second one accepts newer PTX versions
                try:
                    exe = tool(name)
                except FileNotFoundError:
                    continue
                r = subprocess.run(
                    [exe, f"-arch={m.group(1) if m else arch}", str(p), "-o", str(out)], capture_output=True, text=True
                )
                msg = msg or r.stderr or r.stdout
                if r.returncode == 0:
                    break
            else:
                raise RuntimeError(f"ptxas failed:\n{msg}")
            p = out
        use = subprocess.run([tool("cuobjdump"), "-res-usage", str(p)], capture_output=True, text=True)
        text = use.stdout + use.stderr
        res: dict = {}
        for m in re.finditer(r"Function (\S+):\s*\n?\s*([^\n]*)", text):
            kv = {k.strip(): int(v) for k, v in re.findall(r"([A-Z_]+(?:\[\d+\])?):(\d+)", m.group(2))}
            res[m.group(1)] = {
                "registers": kv.get("REG"),
                "stack": kv.get("STACK", 0),
                "static_shared": kv.get("SHARED", 0),
                "local": kv.get("LOCAL", 0),
            }
        dump = subprocess.run([tool("cuobjdump"), "-sass", str(p)], capture_output=True, text=True)
        cur, buf, fn = None, [], {}
        for ln in dump.stdout.splitlines():
            m = re.match(r"\s*Function\s*:\s*(\S+)", ln)
            if m:
                cur = m.group(1)
                fn[cur] = buf = []
            elif cur:
                buf.append(ln)
        for k, lines in fn.items():
            res.setdefault(k, {}).update(analyse_text(lines))
        return res


def table(res: dict) -> str:
    out = []
    for k, r in res.items():
        out.append(
            f"{k}\n  registers {r.get('registers')}  stack {r.get('stack')}  static shared {r.get('static_shared')}  local stores/loads (spills)"
            f" {r.get('spill_stores')}/{r.get('spill_loads')}  instructions {r.get('instructions')}"
        )
        hot = r.get("hot_loop") or {}
        out.append(f"  {'group':14s}{'kernel':>9s}{'hot loop':>10s}")
        for g, n in r.get("mix", {}).items():
            out.append(f"  {g:14s}{n:9d}{hot.get('mix', {}).get(g, 0):10d}")
        if hot:
            out.append(f"  hot loop {hot['start']}..{hot['end']}: {hot['instructions']} instructions, {hot['tensor']} tensor")
    return "\n".join(out)


def main(argv: list | None = None) -> int:
    ap = argparse.ArgumentParser(prog="ptx_emulator.sass", description=__doc__)
    ap.add_argument("file")
    ap.add_argument("--json", action="store_true", help="print JSON only")
    ap.add_argument("--arch", default="sm_80")
    ap.add_argument("--kernel", help="only kernels whose name contains this")
    a = ap.parse_args(argv)
    res = {k: v for k, v in analyse(a.file, a.arch).items() if not a.kernel or a.kernel in k}
    if a.json:
        print(json.dumps(res, indent=1))
    else:
        print(table(res))
        print(json.dumps(res))
    return 0


if __name__ == "__main__":
    sys.exit(main())
