"""Builds the C++ engine once (cached by content hash) and wraps its C interface."""

from __future__ import annotations

import ctypes as C
import hashlib
import os
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .lower import Lowered

SRC = Path(__file__).parent / "runtime"
UNITS = ["core.cpp", "int_ops.cpp", "fp_ops.cpp", "mem_ops.cpp", "tensor_ops.cpp"]
FLAGS = [
    "-std=c++20",
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-pthread",
]
STAT_FIELDS = ["n", "lanes", "req", "bytes", "sectors", "wave", "ideal", "lbytes"]
SUMMARY = [
    "ctas",
    "warps",
    "warp_instructions",
    "max_cta_instructions",
    "min_cta_instructions",
    "barrier_arrivals",
    "max_barriers_per_warp",
    "max_cp_async_groups_in_flight",
    "shared_high_water",
    "divergent_branches",
    "branches",
    "try_wait_timeouts",
    "max_warp_instructions",
    "mbarrier_waits",
    "bulk_bytes",
    "redundant_shared_writes",
]


class Range(C.Structure):
    _fields_ = [("lo", C.c_uint64), ("hi", C.c_uint64), ("ro", C.c_uint32), ("pad", C.c_uint32), ("bit0", C.c_uint64)]


class LaunchArgs(C.Structure):
    _fields_ = [
        ("grid", C.c_uint32 * 3),
        ("block", C.c_uint32 * 3),
        ("cluster", C.c_uint32 * 3),
        ("shared_bytes", C.c_uint32),
        ("static_shared", C.c_uint32),
        ("dyn_shared", C.c_uint32),
        ("params", C.c_void_p),
        ("params_size", C.c_uint64),
        ("nranges", C.c_uint32),
        ("ranges", C.POINTER(Range)),
        ("nbits", C.c_uint64),
        ("ld_bits", C.c_void_p),
        ("st_bits", C.c_void_p),
        ("stats", C.c_void_p),
        ("summary", C.c_void_p),
        ("errbuf", C.c_char_p),
        ("errlen", C.c_uint32),
        ("outbuf", C.c_char_p),
        ("outlen", C.c_uint32),
        ("nthreads", C.c_uint32),
        ("seed", C.c_uint32),
        ("quantum", C.c_uint32),
        ("check_race", C.c_uint32),
        ("check_uninit_shared", C.c_uint32),
        ("check_uninit_reg", C.c_uint32),
        ("check_wgmma_regs", C.c_uint32),
        ("cooperative", C.c_uint32),
        ("check_proxy", C.c_uint32),
        ("max_steps", C.c_uint64),
        ("smem_fill", C.c_uint32),
        ("nsm", C.c_uint32),
        ("dependent", C.c_uint32),
        ("nearlier", C.c_uint32),
        ("earlier", C.c_void_p),
    ]


def cache_dir() -> Path:
    d = os.environ.get("PTX_EMULATOR_CACHE")
    p = Path(d) if d else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptx_emulator"
    p.mkdir(parents=True, exist_ok=True)
    return p


def _cpu() -> str:
    try:
        return next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "")
    except OSError:
        return platform.processor()


def build() -> Path:
    cxx = os.environ.get("CXX", "g++")
    h = hashlib.sha256()
    for f in sorted(SRC.glob("*.[ch]pp")):
        h.update(f.read_bytes())
    h.update(" ".join([cxx] + FLAGS + [_cpu()]).encode())
    out = cache_dir() / f"engine-{h.hexdigest()[:16]}.so"
    if out.exists():
        return out
    with tempfile.TemporaryDirectory(dir=cache_dir()) as td:

        def one(u: str) -> str:
            o = f"{td}/{u}.o"
            r = subprocess.run([cxx, *FLAGS, "-c", str(SRC / u), "-o", o], capture_output=True, text=True)
            if r.returncode:
                raise RuntimeError(f"compiling {u} failed:\n{r.stderr}")
            return o

        with ThreadPoolExecutor(2) as ex:
            objs = list(ex.map(one, UNITS))
        tmp = f"{td}/engine.so"
        subprocess.run([cxx, "-shared", "-pthread", "-o", tmp, *objs], check=True)
        os.replace(tmp, out)
    return out


_lib: C.CDLL | None = None


def lib() -> C.CDLL:
    global _lib
    if _lib is None:
        _lib = C.CDLL(str(build()))
        _lib.ptxe_program.restype = C.c_void_p
        _lib.ptxe_launch.argtypes = [C.c_void_p, C.POINTER(LaunchArgs)]
        _lib.ptxe_free.argtypes = [C.c_void_p]
    return _lib


def _p(a: np.ndarray) -> C.c_void_p:
    return C.c_void_p(a.ctypes.data if a.size else 0)


class Program:
    """A lowered kernel inside the engine."""

    def __init__(self, low: Lowered):
        L = lib()
        missing = [o for o in low.ops if not L.ptxe_has_op(o.encode())]
        if missing:
            bad = {low.ops.index(o): o for o in missing}
            k = next(i for i, r in enumerate(low.rows) if r[0] in bad)
            from .parser import PtxError

            raise PtxError(
                f"{low.name}: PTX line {low.meta[k].line}: {low.meta[k].op} is not supported (no handler {bad[low.rows[k][0]]})"
            )
        ops = (C.c_char_p * len(low.ops))(*[o.encode() for o in low.ops])
        rows = np.array(low.rows, dtype=object)
        t = np.array([[int(v) for v in r] for r in low.rows], dtype=np.int64)
        del rows
        u32 = lambda x: np.array(x, dtype=np.uint64).astype(np.uint32).ravel() if len(x) else np.zeros(1, np.uint32)
        pool, regl, spec = u32(low.pool), u32(low.regl), u32(low.spec)
        consts = np.array(low.consts, dtype=np.uint64).ravel() if low.consts else np.zeros(3, np.uint64)
        funcs, slots = u32([x for f in low.funcs for x in f]), u32(low.slots)
        brx = u32([x for b in low.brx for x in [len(b)] + b])
        self.h = L.ptxe_program(
            low.name.encode(),
            ops,
            _p(t),
            len(low.rows),
            _p(pool),
            len(low.pool),
            _p(regl),
            len(low.regl),
            _p(consts),
            len(low.consts),
            _p(spec),
            low.rf,
            low.local,
            low.gran,
            _p(funcs),
            len(low.funcs),
            _p(slots),
            len(low.slots),
            _p(brx),
            sum(len(b) + 1 for b in low.brx),
        )
        if not self.h:
            raise RuntimeError("engine refused the program")

    def __del__(self) -> None:
        if getattr(self, "h", None) and _lib is not None:
            _lib.ptxe_free(self.h)
