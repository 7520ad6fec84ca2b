"""Compile Triton kernels for an NVIDIA target without a GPU and run their PTX."""

from __future__ import annotations

from typing import Any

import numpy as np

from .api import Module, _is_tensor, load
from .report import Report

_DT = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "bool": "i1",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}
_cache: dict = {}


def _type_of(a: Any) -> tuple:
    """Triton signature type and divisibility of an argument."""
    if _is_tensor(a) or isinstance(a, np.ndarray):
        dt = str(a.dtype).replace("torch.", "")
        p = a.data_ptr() if _is_tensor(a) else a.ctypes.data
        return "*" + _DT[dt], p % 16 == 0
    if isinstance(a, bool):
        return "i1", False
    if isinstance(a, (int, np.integer)):
        a = int(a)
        t = "i32" if -(2**31) <= a < 2**31 else "i64" if a < 2**63 else "u64"
        return t, a % 16 == 0
    if isinstance(a, float):
        return "fp32", False
    raise TypeError(f"cannot pass {type(a).__name__} to a Triton kernel")


class CompiledTriton:
    """PTX of a Triton kernel together with the launch data from its metadata."""

    def __init__(self, compiled: Any, num_warps: int):
        self.ptx: str = compiled.asm["ptx"]
        self.cubin: bytes = compiled.asm["cubin"]
        md = compiled.metadata
        self.name: str = md.name
        self.shared: int = md.shared
        self.num_warps: int = md.num_warps
        self.num_ctas: int = getattr(md, "num_ctas", 1) or 1
        self.global_scratch: int = getattr(md, "global_scratch_size", 0) or 0
        self.profile_scratch: int = getattr(md, "profile_scratch_size", 0) or 0
        self.module: Module = load(self.ptx, self.name)
        self.kernel = self.module.kernel(self.name)
        req = self.kernel.low.directives.get("reqntid")
        self.block: int = req[0] if req else 32 * self.num_warps


def triton_compile(
    fn: Any,
    signature: dict,
    constexprs: dict,
    attrs: dict,
    target: int = 80,
    num_warps: int = 4,
    num_stages: int = 2,
    **options: Any,
) -> CompiledTriton:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    src = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    r = triton.compile(
        src, target=GPUTarget("cuda", target, 32), options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )
    return CompiledTriton(r, num_warps)


def triton_launch(
    fn: Any,
    grid: Any,
    *args: Any,
    target: int = 80,
    num_warps: int = 4,
    num_stages: int = 2,
    options: dict | None = None,
    launch: dict | None = None,
    **constexprs: Any,
) -> Report:
    """Compile `fn` for the target and run it.  Keyword arguments are the constexprs (or further arguments by name).

    `grid` is a tuple or a function of the constexprs; `launch` holds options for Kernel.launch.
    """
    names = list(fn.arg_names)
    values: dict = dict(zip(names, args))
    values.update(constexprs)
    cx = {p.name for p in fn.params if p.is_constexpr}
    for p in fn.params:
        if p.name not in values:
            if p.has_default:
                values[p.name] = p.default
            else:
                raise TypeError(f"missing argument {p.name}")
    sig, consts, attrs, run = {}, {}, {}, []
    for k, n in enumerate(names):
        v = values[n]
        if n in cx or v is None:
            sig[n] = "constexpr"
            consts[n] = v
        else:
            t, div = _type_of(v)
            sig[n] = t
            if div and not fn.params[k].do_not_specialize:
                attrs[(k,)] = [["tt.divisibility", 16]]
            run.append(v)
    key = (
        id(fn),
        fn.cache_key if hasattr(fn, "cache_key") else "",
        tuple(sig.items()),
        tuple((k, str(v)) for k, v in consts.items()),
        tuple(attrs),
        target,
        num_warps,
        num_stages,
        str(options),
    )
    if key not in _cache:
        _cache[key] = triton_compile(fn, sig, consts, attrs, target, num_warps, num_stages, **(options or {}))
    c = _cache[key]
    g = grid(values) if callable(grid) else grid
    g = tuple(g) if not isinstance(g, int) else (g,)
    g = (g + (1, 1, 1))[:3]
    nb = g[0] * g[1] * g[2]
    real = (g[0] * c.num_ctas, g[1], g[2])
    extra = len(c.kernel.params) - len(run)
    scratch = [
        np.zeros(max(128, c.global_scratch * nb * c.num_ctas) + 128, np.uint8),
        np.zeros(max(128, c.profile_scratch * nb * c.num_ctas) + 128, np.uint8),
    ]
    scratch = [s[(-s.ctypes.data) % 128 :] for s in scratch]
    full = run + scratch[:extra]
    rep = c.kernel.launch(
        real, c.block, full, shared=c.shared, cluster=(c.num_ctas, 1, 1) if c.num_ctas > 1 else None, **(launch or {})
    )
    rep.compiled = c
    return rep
