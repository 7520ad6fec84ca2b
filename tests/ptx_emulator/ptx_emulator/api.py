"""Loading PTX modules and launching kernels."""

from __future__ import annotations

import ctypes as C
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import engine
from . import report as rep
from .engine import LaunchArgs, Range
from .lower import WIN_FUNC, Lowered, function_names, lower
from .parser import TYPE_SIZE, Imm, parse
from .parser import Module as Tree
from .tensormap import TensorMap


class KernelError(Exception):
    """A check failed while the kernel ran.

    kind is one of out-of-bounds, misaligned, uninitialised, race, async-copy, barrier, deadlock, divergence, warp-sync,
    mbarrier, tensormap, wgmma, proxy, dependent-launch, limit, trap, assert, control, unsupported.
    """

    def __init__(
        self,
        kernel: str,
        kind: str,
        line: int,
        text: str,
        src: str,
        block: tuple,
        warp: int,
        lane: int,
        address: int,
        message: str,
    ):
        self.kernel, self.kind, self.line, self.ptx, self.source = kernel, kind, line, text, src
        self.block, self.warp, self.lane, self.address, self.message = block, warp, lane, address, message
        where = f"block {block}, warp {warp}" + (f", lane {lane}" if lane >= 0 else "")
        at = f"\n    {text.strip()}" if text else ""
        super().__init__(
            f"[{kind}] {message}\n  kernel {kernel}, PTX line {line}{' (' + src + ')' if src else ''}, {where}{at}"
        )


def _dim3(x: Any) -> tuple:
    t = (x,) if isinstance(x, int) else tuple(int(v) for v in x)
    return (t + (1, 1, 1))[:3]


def _is_tensor(a: Any) -> bool:
    return hasattr(a, "data_ptr") and hasattr(a, "element_size")


def _extent(a: Any) -> tuple:
    """Host address range of a numpy array or CPU tensor (including strided views)."""
    if _is_tensor(a):
        if a.device.type != "cpu":
            raise TypeError("tensor arguments must be on the CPU")
        lo = a.data_ptr()
        if a.numel() == 0:
            return lo, lo
        return lo, lo + (sum((n - 1) * s for n, s in zip(a.shape, a.stride())) + 1) * a.element_size()
    lo, hi = np.lib.array_utils.byte_bounds(a) if hasattr(np.lib, "array_utils") else np.byte_bounds(a)
    return lo, hi


class Kernel:
    def __init__(self, module: Module, name: str):
        self.module, self.name, self.mod = module, name, module.tree
        self.low: Lowered = lower(module.tree, name, module.var_addr)
        self.program = engine.Program(self.low)

    @property
    def params(self) -> list:
        return self.low.params

    def pack(self, args: Sequence[Any], ranges: list, keep: list) -> np.ndarray:
        if len(args) != len(self.low.params):
            raise TypeError(f"{self.name} takes {len(self.low.params)} parameters, {len(args)} given")
        buf = np.zeros(max(16, self.low.param_size) + 64, np.uint8)
        buf = buf[(-buf.ctypes.data) % 64 :][: max(16, self.low.param_size)]
        for a, (pn, typ, off, size, _) in zip(args, self.low.params):
            b = self.encode(a, typ, size, ranges, keep)
            if len(b) != size:
                raise TypeError(f"parameter {pn} of {self.name} has {size} bytes, argument has {len(b)}")
            buf[off : off + size] = np.frombuffer(b, np.uint8)
        return buf

    @staticmethod
    def encode(a: Any, typ: str, size: int, ranges: list, keep: list) -> bytes:
        if a is None:
            return bytes(size)
        if isinstance(a, TensorMap):
            lo, hi = _extent(a.tensor)
            ranges.append((lo, hi, 0))
            keep.append(a)
            raw = a.encode(lo)
            if size == 128:
                return raw
            b = np.zeros(192, np.uint8)
            b = b[(-b.ctypes.data) % 64 :][:128]
            b[:] = np.frombuffer(raw, np.uint8)
            keep.append(b)
            ranges.append((b.ctypes.data, b.ctypes.data + 128, 0))
            return struct.pack("<Q", b.ctypes.data)
        if isinstance(a, (bytes, bytearray)):
            return bytes(a)
        if _is_tensor(a) or (isinstance(a, np.ndarray) and a.ndim >= 0 and not np.isscalar(a)):
            lo, hi = _extent(a)
            keep.append(a)
            ranges.append((lo, hi, 0))
            p = a.data_ptr() if _is_tensor(a) else a.ctypes.data
            return struct.pack("<Q", p)
        if isinstance(a, (bool, int, np.integer)):
            if typ == "f32":
                return struct.pack("<f", a)
            if typ == "f64":
                return struct.pack("<d", a)
            return (int(a) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        if isinstance(a, np.generic):
            return a.tobytes()
        if isinstance(a, float):
            if size == 2:
                return struct.pack("<e", a)
            return struct.pack("<d" if size == 8 else "<f", a)
        raise TypeError(f"cannot pass {type(a).__name__} to a kernel")

    def launch(
        self,
        grid: Any,
        block: Any,
        args: Sequence[Any] = (),
        shared: int = 0,
        cluster: Any = None,
        threads: int | None = None,
        seed: int = 0,
        quantum: int = 256,
        check_race: bool = True,
        check_uninit_shared: bool = True,
        check_uninit_reg: bool = False,
        check_wgmma_regs: bool = False,
        check_proxy: bool = False,
        cooperative: bool = False,
        max_steps: int = 1 << 31,
        buffers: Sequence[Any] = (),
        smem_fill: int = 0xCD,
        num_sms: int = 108,
        after: Sequence[tuple] | None = None,
    ) -> rep.Report:
        """Run the kernel.

        shared      dynamic shared memory in bytes
        buffers     further arrays the kernel may reach through pointers stored in memory
        threads     worker threads over the blocks (default: CPU count, at most 8); 1 runs blocks in order
        seed        seeds the warp schedule; quantum bounds the instructions a warp runs before another is chosen
        cooperative runs all blocks of the grid interleaved (grid-wide barriers)
        after       a programmatic dependent launch: the address ranges that the kernels before may still be writing
                    (`written()` of their reports), which no thread may read before its griddepcontrol.wait
        """
        low = self.low
        g, b = _dim3(grid), _dim3(block)
        d = low.directives
        cl = _dim3(cluster) if cluster else _dim3(tuple(d["reqnctapercluster"])) if d.get("reqnctapercluster") else (1, 1, 1)
        if any(x % y for x, y in zip(g, cl)):
            raise ValueError("grid is not a multiple of the cluster size")
        if d.get("reqntid") and _dim3(tuple(d["reqntid"])) != b:
            raise ValueError(f"{self.name} requires a block of {d['reqntid']} threads")
        n = b[0] * b[1] * b[2]
        if not 1 <= n <= 1024:
            raise ValueError("a block has 1 to 1024 threads")
        if d.get("maxntid") and n > int(np.prod(d["maxntid"])):
            raise ValueError(f"{self.name} allows at most {d['maxntid']} threads")
        ranges: list = [(lo, hi, ro) for lo, hi, ro in self.module.ranges]
        keep: list = []
        params = self.pack(args, ranges, keep)
        for x in buffers:
            ranges.append((*_extent(x), 0))
        ranges.append((params.ctypes.data, params.ctypes.data + params.nbytes, 1))
        ranges = sorted(r for r in ranges if r[1] > r[0])
        merged: list = []
        for lo, hi, ro in ranges:
            if merged and lo < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(hi, merged[-1][1]), merged[-1][2] & ro)
            else:
                merged.append((lo, hi, ro))
        R = (Range * max(1, len(merged)))()
        bits = 0
        for k, (lo, hi, ro) in enumerate(merged):
            R[k] = Range(lo, hi, ro, 0, bits)
            bits += ((hi - 1) >> 5) - (lo >> 5) + 1
        ld, st = np.zeros(bits // 8 + 1, np.uint8), np.zeros(bits // 8 + 1, np.uint8)
        stats = np.zeros((len(low.rows), len(engine.STAT_FIELDS)), np.uint64)
        summary = np.zeros(64, np.uint64)
        err, out = C.create_string_buffer(4096), C.create_string_buffer(1 << 20)
        A = LaunchArgs()
        A.grid, A.block, A.cluster = g, b, cl
        dyn = shared
        A.shared_bytes, A.static_shared, A.dyn_shared = low.static_shared + dyn, low.static_shared, dyn
        A.params, A.params_size = params.ctypes.data, params.nbytes
        A.nranges, A.ranges, A.nbits = len(merged), R, bits
        A.ld_bits, A.st_bits, A.stats, A.summary = ld.ctypes.data, st.ctypes.data, stats.ctypes.data, summary.ctypes.data
        A.errbuf, A.errlen = C.cast(err, C.c_char_p), 4096
        A.outbuf, A.outlen = C.cast(out, C.c_char_p), 1 << 20
        nb = g[0] * g[1] * g[2]
        A.nthreads = 1 if cooperative else max(1, min(threads or min(os.cpu_count() or 1, 8), nb))
        A.seed, A.quantum, A.max_steps = seed, max(1, quantum), max_steps
        A.check_race, A.check_uninit_shared, A.check_uninit_reg = (
            int(check_race),
            int(check_uninit_shared),
            int(check_uninit_reg),
        )
        A.check_wgmma_regs, A.check_proxy, A.cooperative, A.smem_fill, A.nsm = (
            int(check_wgmma_regs),
            int(check_proxy),
            int(cooperative),
            smem_fill,
            num_sms,
        )
        earlier = np.array(sorted(after or ()), np.uint64).reshape(-1, 2)
        if len(earlier):  # those that touch or overlap become one
            ends = np.maximum.accumulate(earlier[:, 1])
            first = np.append(True, earlier[1:, 0] > ends[:-1])
            earlier = np.stack([earlier[first, 0], np.append(ends[:-1][first[1:]], ends[-1])], 1)
        A.dependent, A.nearlier, A.earlier = int(after is not None), len(earlier), earlier.ctypes.data
        warps = cl[0] * cl[1] * cl[2] * ((n + 31) // 32)
        if warps > 96:
            raise ValueError("clusters of more than 96 warps are not supported")
        t0 = time.perf_counter()
        rc = engine.lib().ptxe_launch(self.program.h, C.byref(A)) if nb else 0
        dt = time.perf_counter() - t0
        if rc:
            kind, line, bx, by, bz, wp, lane, addr, msg = err.value.decode(errors="replace").split("\x1f")
            ln = int(line)
            text = self.module.lines[ln - 1] if 0 < ln <= len(self.module.lines) else ""
            src = next((f"{self.mod.files.get(m.src[0], '?')}:{m.src[1]}" for m in low.meta if m.line == ln and m.src[0]), "")
            raise KernelError(
                self.name, kind, ln, text[:200], src, (int(bx), int(by), int(bz)), int(wp), int(lane), int(addr), msg
            )
        info = dict(
            grid=g,
            block=b,
            cluster=cl,
            shared_bytes=int(A.shared_bytes),
            static_shared=low.static_shared,
            threads=int(A.nthreads),
            seconds=dt,
        )
        r = rep.make_report(self, stats, summary, ld, st, info)
        r.stores = st, [(lo, hi, R[k].bit0) for k, (lo, hi, _) in enumerate(merged)]
        r.output = out.value.decode(errors="replace")
        return r


class Module:
    """A parsed PTX module with its global and constant variables allocated."""

    def __init__(self, text: str, name: str = "<ptx>"):
        self.text, self.name = text, name
        self.lines = text.splitlines()
        self.tree: Tree = parse(text)
        self.storage: dict = {}
        self.var_addr: dict = {}
        self.ranges: list = []
        self._kernels: dict = {}
        allv = dict(self.tree.variables)
        for f in self.tree.functions.values():
            for k, v in f.vars.items():
                if v.space in ("global", "const"):
                    allv[k] = v
        for v in allv.values():
            if v.space in ("global", "const"):
                raw = np.zeros(max(16, v.size) + 256, np.uint8)
                a = raw[(-raw.ctypes.data) % 256 :][: max(16, v.size)]
                self.storage[v.name] = a
                self.var_addr[v.name] = a.ctypes.data
                self.ranges.append((a.ctypes.data, a.ctypes.data + a.nbytes, int(v.space == "const")))
        for v in allv.values():
            if v.init and v.name in self.storage:
                self._init(v)

    def _init(self, v: Any) -> None:
        a, off, sz = self.storage[v.name], 0, TYPE_SIZE[v.type]
        for x in v.init:
            if isinstance(x, Imm):
                if x.kind == "f64" and v.type == "f32":
                    b = struct.pack("<f", struct.unpack("<d", struct.pack("<Q", x.value))[0])
                else:
                    b = (x.value & ((1 << (8 * sz)) - 1)).to_bytes(sz, "little")
            else:
                fn = function_names(self.tree)
                addr = WIN_FUNC | fn.index(x[1].name) if x[1].name in fn else self.var_addr.get(x[1].name, 0)
                b = struct.pack("<Q", addr + x[1].offset)[:sz]
            a[off : off + sz] = np.frombuffer(b, np.uint8)
            off += sz

    @property
    def kernels(self) -> list:
        return [n for n, f in self.tree.functions.items() if f.entry]

    def kernel(self, name: str | None = None) -> Kernel:
        """The kernel of this name; a demangled name or a unique part of one is accepted."""
        names = self.kernels
        if name is None:
            if len(names) != 1:
                raise KeyError(f"the module has {len(names)} kernels: {names}")
            name = names[0]
        if name not in names:
            dm = self.demangled()
            hit = [n for n in names if dm[n] == name or dm[n].split("(")[0].split(" ")[-1].split("<")[0] == name] or [
                n for n in names if name in dm[n]
            ]
            if len(hit) != 1:
                raise KeyError(f"no unique kernel {name!r} among {sorted(dm.values())}")
            name = hit[0]
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]

    def demangled(self) -> dict:
        names = self.kernels
        try:
            out = (
                subprocess.run(["c++filt"] + names, capture_output=True, text=True, check=True).stdout.split("\n")
                if names
                else []
            )
            return dict(zip(names, out))
        except (OSError, subprocess.CalledProcessError):
            return {n: n for n in names}

    def variable(self, name: str, dtype: Any = np.uint8) -> np.ndarray:
        """The storage of a module .global or .const variable, for reading and writing."""
        return (
            self.storage[name].view(dtype) if self.storage[name].nbytes % np.dtype(dtype).itemsize == 0 else self.storage[name]
        )


def load(text: str, name: str = "<ptx>") -> Module:
    return Module(text, name)


def compile_cuda(source: Any, arch: str = "sm_80", flags: Sequence[str] = ()) -> Module:
    """Compile CUDA C++ (a path, or source text) with nvcc -ptx and load it."""
    with tempfile.TemporaryDirectory() as td:
        p = Path(str(source))
        try:
            isfile = "\n" not in str(source) and p.exists()
        except OSError:
            isfile = False
        if not isfile:
            p = Path(td) / "kernel.cu"
            p.write_text(str(source))
        out = Path(td) / "kernel.ptx"
        r = subprocess.run(
            ["nvcc", "-ptx", f"-arch={arch}", "-std=c++17", "-lineinfo", *flags, "-o", str(out), str(p)],
            capture_output=True,
            text=True,
        )
        if r.returncode:
            raise RuntimeError(f"nvcc failed:\n{r.stderr}")
        return Module(out.read_text(), p.name)
