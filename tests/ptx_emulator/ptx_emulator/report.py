"""Launch reports: counters, tables and a simple cycle estimate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from .engine import STAT_FIELDS, SUMMARY

CLASS_NAMES = {
    "tensor": "tensor",
    "fp32": "fma/alu fp32",
    "fp64": "fp64",
    "int": "int alu",
    "mov": "moves",
    "mufu": "MUFU special function",
    "cvt": "conversion",
    "shared": "shared ld/st",
    "ldmatrix": "ldmatrix/stmatrix",
    "global": "global ld/st",
    "local": "local ld/st",
    "async_copy": "async copy",
    "shuffle": "warp shuffle/vote",
    "control": "control",
    "barrier": "barrier",
}


@dataclass
class Chip:
    """Issue costs in cycles per warp instruction on one SM sub-partition (a quarter of an SM).

    Sources: the arithmetic throughput table of the CUDA C++ Programming Guide (results per clock and SM, divided by
    four sub-partitions), and the A100 / H100 architecture white papers for tensor throughput, clocks and bandwidths.
    """

    name: str
    sms: int
    clock_ghz: float
    tensor_flops_per_clk_sm: dict  # dense
    dram_gbs: float
    l2_bytes_per_clk_sm: float
    shared_bytes_per_clk_sm: float = 128.0
    fp32_lanes: int = 128  # per SM
    int_lanes: int = 64
    mufu_lanes: int = 16
    cvt_lanes: int = 64  # 32-bit conversions; 16 from/to 64-bit types
    fp64_lanes: int = 32
    lsu_lanes: int = 32  # addresses per clock and SM (one warp instruction per clock)
    shuffle_lanes: int = 32


CHIPS = {
    "A100": Chip("A100", 108, 1.41, {"f16": 2048, "tf32": 1024, "int8": 4096, "f64": 128}, 1555, 64, fp32_lanes=64),
    "H100": Chip(
        "H100 SXM",
        132,
        1.83,
        {"f16": 4096, "tf32": 2048, "fp8": 8192, "int8": 8192, "f64": 256},
        3350,
        64,
        int_lanes=64,
        fp64_lanes=64,
    ),
}


class Report(dict):
    """Counters of one launch; also carries per-instruction rows in `.instructions`."""

    instructions: list
    output: str = ""
    stores: tuple  # a bit per 32-byte sector that was written; first byte, end and first bit of every buffer

    def written(self) -> list[tuple[int, int]]:
        """Address ranges that the launch wrote, in whole sectors of 32 bytes."""
        bits, buffers = np.unpackbits(self.stores[0], bitorder="little"), self.stores[1]
        found = []
        for lo, hi, first in buffers:
            sectors = bits[first : first + ((hi - 1) >> 5) - (lo >> 5) + 1]
            edges = np.flatnonzero(np.diff(sectors, prepend=0, append=0).astype(bool)) if len(sectors) else []
            found += [((lo >> 5) + int(a) << 5, (lo >> 5) + int(b) << 5) for a, b in zip(edges[::2], edges[1::2])]
        return found

    def table(self) -> str:
        L = []
        a = L.append
        a(f"kernel {self['kernel']}  grid {self['grid']}  block {self['block']}  shared {self['shared_bytes']} B")
        a(
            f"  warp instructions {self['warp_instructions']:,}  (lane efficiency {self['lane_efficiency']:.1%})  time {self['seconds']:.3f} s, "
            f"{self['lane_ops_per_second'] / 1e6:.0f} M lane-ops/s"
        )
        a("  by pipe:")
        for k, v in sorted(self["by_class"].items(), key=lambda x: -x[1]):
            a(f"    {CLASS_NAMES.get(k, k):24s}{v:14,d}  {v / max(1, self['warp_instructions']):6.1%}")
        a("  by opcode (top 15):")
        for k, v in sorted(self["by_opcode"].items(), key=lambda x: -x[1])[:15]:
            a(f"    {k[:56]:56s}{v:14,d}")
        a(f"  tensor FLOPs {self['tensor_flops']:,}   MUFU lane-ops {self['mufu_lane_ops']:,}")
        g = self["global"]
        for d in ("load", "store", "atomic"):
            x = g[d]
            if x["requests"]:
                a(
                    f"  global {d:7s} requests {x['requests']:,}  bytes asked {x['bytes']:,}  sectors {x['sectors']:,} ({x['sectors'] * 32:,} B)"
                    f"  efficiency {x['efficiency']:.1%}"
                )
        a(
            f"  unique sectors: loads {g['unique_load_sectors']:,} ({g['unique_load_sectors'] * 32:,} B), stores {g['unique_store_sectors']:,}"
            f" ({g['unique_store_sectors'] * 32:,} B)"
        )
        s = self["shared"]
        for d in ("load", "store", "ldmatrix", "stmatrix", "atomic", "async_write"):
            x = s[d]
            if x["requests"]:
                a(
                    f"  shared {d:11s} requests {x['requests']:,}  wavefronts {x['wavefronts']:,}  ideal {x['ideal']:,}  ({x['wavefronts'] / max(1, x['ideal']):.2f}x)"
                )
        a(
            f"  shared high-water {self['shared_high_water']:,} B   local bytes {self['local_bytes']:,}   barriers/warp max {self['max_barriers_per_warp']}"
        )
        return "\n".join(L)

    __str__ = table

    def to_json(self) -> str:
        return json.dumps(dict(self), indent=1, default=str)

    def hot(self, n: int = 20) -> list:
        """The most executed PTX lines: (line, source, opcode, warp executions, wavefronts, sectors)."""
        r = sorted(self.instructions, key=lambda x: -x["n"])[:n]
        return [(x["line"], x["src"], x["op"], x["n"], x["wave"], x["sectors"]) for x in r]

    def estimate(self, chip: str = "H100") -> dict:
        """Issue-bound cycle estimate per SM sub-partition.

        Every pipe class is summed on its own and the largest names the bound; latencies, dependencies, occupancy and
        caches are left out, so the tensor utilisation is an upper bound and the time a lower bound.
        """
        c = CHIPS[chip]
        part = 4 * c.sms  # sub-partitions, work spread evenly
        by, fl = self["by_class"], self["tensor_flops_by_type"]
        # blocks come in waves: with fewer blocks than SMs the idle ones do no work
        waves = -(-self["ctas"] // c.sms)
        balance = self["ctas"] / (waves * c.sms)
        cyc = {}
        cyc["issue"] = (self["warp_instructions"] - by.get("mov", 0)) / part  # most PTX moves vanish in machine code
        cyc["tensor"] = (
            sum(v / c.tensor_flops_per_clk_sm.get(t, c.tensor_flops_per_clk_sm["f16"]) for t, v in fl.items()) / c.sms
        )
        cyc["fp32"] = by.get("fp32", 0) * 32 / (c.fp32_lanes / 4) / part
        cyc["int"] = by.get("int", 0) * 32 / (c.int_lanes / 4) / part
        cyc["mufu"] = by.get("mufu", 0) * 32 / (c.mufu_lanes / 4) / part
        cyc["conversion"] = by.get("cvt", 0) * 32 / (c.cvt_lanes / 4) / part
        cyc["fp64"] = by.get("fp64", 0) * 32 / (c.fp64_lanes / 4) / part
        wav = sum(x["wavefronts"] for x in self["shared"].values())
        cyc["shared"] = (wav + by.get("shuffle", 0)) / c.sms
        sec = sum(self["global"][d]["sectors"] for d in ("load", "store", "atomic"))
        cyc["l1_l2"] = sec * 32 / c.l2_bytes_per_clk_sm / c.sms
        uniq = (self["global"]["unique_load_sectors"] + self["global"]["unique_store_sectors"]) * 32
        cyc["dram"] = uniq / (c.dram_gbs / c.clock_ghz)
        cyc = {k: v / balance if k != "dram" else v for k, v in cyc.items()}
        bound = max(cyc, key=lambda k: cyc[k])
        worst = cyc[bound] or 1.0
        return {
            "chip": c.name,
            "estimate": True,
            "cycles": {k: round(v, 1) for k, v in cyc.items()},
            "bound": bound,
            "cycles_lower_bound": worst,
            "microseconds_lower_bound": worst / c.clock_ghz / 1e3,
            "tensor_utilisation_upper_bound": cyc["tensor"] / worst,
            "sm_balance": balance,
        }


def tensor_type(op: str) -> str:
    p = op.split(".")
    if "f64" in p:
        return "f64"
    if "tf32" in p:
        return "tf32"
    if "e4m3" in p or "e5m2" in p:
        return "fp8"
    if "s8" in p or "u8" in p:
        return "int8"
    return "f16"


def make_report(kernel: Any, stats: np.ndarray, summary: np.ndarray, ld: np.ndarray, st: np.ndarray, info: dict) -> Report:
    r = Report()
    r["kernel"] = kernel.name
    r.update(info)
    for k, n in enumerate(SUMMARY):
        r[n] = int(summary[k])
    ops: dict = {}
    cls: dict = {}
    rows = []
    g = {d: dict(requests=0, bytes=0, sectors=0) for d in ("load", "store", "atomic")}
    s = {
        d: dict(requests=0, bytes=0, wavefronts=0, ideal=0)
        for d in ("load", "store", "ldmatrix", "stmatrix", "atomic", "async_write")
    }
    flops, byt, mufu, local, lanes = 0, {}, 0, 0, 0
    for m, x in zip(kernel.low.meta, stats.tolist()):
        n, ln, req, by, sec, wave, ideal, lb = x
        if n == 0:
            continue
        ops[m.op] = ops.get(m.op, 0) + n
        cls[m.cls] = cls.get(m.cls, 0) + n
        lanes += ln
        if m.flops:
            flops += m.flops * n
            t = tensor_type(m.op)
            byt[t] = byt.get(t, 0) + m.flops * n
        if m.cls == "mufu":
            mufu += ln * (2 if m.op.endswith("x2") else 1)
        local += lb
        d = None
        if m.mem == "global_ld" or (m.mem == "generic_ld" and sec) or m.mem == "cp_async":
            d = "store" if m.mem == "cp_async" and ".global.shared" in m.op else "load"
        elif m.mem == "global_st" or (m.mem == "generic_st" and sec):
            d = "store"
        elif m.mem == "global_atomic":
            d = "atomic"
        if d:
            g[d]["requests"] += req
            g[d]["bytes"] += by
            g[d]["sectors"] += sec
        if wave:
            q = {"cp_async": "async_write", "shared_atomic": "atomic", "global_atomic": "atomic"}.get(m.mem)
            if q is None:
                q = (
                    ("ldmatrix" if m.mem == "shared_ld" else "stmatrix")
                    if m.cls == "ldmatrix"
                    else ("load" if m.mem.endswith("ld") else "store")
                )
            s[q]["requests"] += req
            s[q]["bytes"] += by
            s[q]["wavefronts"] += wave
            s[q]["ideal"] += ideal
        row = dict(zip(STAT_FIELDS, x))
        row.update(op=m.op, line=m.line, src=f"{kernel.mod.files.get(m.src[0], '')}:{m.src[1]}" if m.src[0] else "", cls=m.cls)
        rows.append(row)
    for d in g.values():
        d["efficiency"] = d["bytes"] / (32 * d["sectors"]) if d["sectors"] else 1.0
    r["by_opcode"], r["by_class"] = ops, cls
    r["warp_instructions"] = sum(cls.values())
    r["lane_ops"] = lanes
    r["lane_efficiency"] = lanes / max(1, 32 * r["warp_instructions"])
    r["tensor_flops"], r["tensor_flops_by_type"], r["mufu_lane_ops"] = flops, byt, mufu
    r["global"] = {
        **g,
        "unique_load_sectors": int(np.unpackbits(ld).sum()),
        "unique_store_sectors": int(np.unpackbits(st).sum()),
    }
    r["shared"] = s
    r["local_bytes"] = local
    r["lane_ops_per_second"] = lanes / max(1e-9, info["seconds"])
    r["barriers_per_warp"] = r["barrier_arrivals"] / max(1, r["warps"])
    r.instructions = rows
    return r
