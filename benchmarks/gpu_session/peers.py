"""Other libraries on the workloads of rope_attention, with a compiled rotation before them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import comp_kernels as ck
from benchmarks import attention_peers
from comp_kernels.testing import AttentionInputs

from .session import Session, peak_memory, time_once
from .workloads import Inputs, Workload, make_inputs, ours, with_backward


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What models do before they call an attention kernel: rotate in float32, round back. cos, sin [T, D / 2]."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def own_backends(device: str) -> list[str]:
    """Backends to report on: the kernels of a GPU; on the CPU, for the dry run, its own and the definition."""
    wanted = ("triton", "cuda") if device == "cuda" else ("cpu", "reference")
    return [backend for backend in ck.available_backends("rope_attention", device) if backend in wanted]


def rotated(x: Inputs, rotate: Callable) -> tuple[Tensor, Tensor]:
    return rotate(x.q, x.cos, x.sin), rotate(x.k, x.cos, x.sin)


def flash_attn() -> Callable:
    from flash_attn import flash_attn_varlen_func
    from flash_attn.layers.rotary import apply_rotary_emb

    def attend(x: Inputs) -> Tensor:
        # Its tables count positions within a sequence, so packed 2D tables go in as one long sequence. They stay float32, as
        # in the models; flash-attn releases that want them in the dtype of q say so, and that is then a note in the report.
        q, k = (apply_rotary_emb(t[None], x.cos, x.sin)[0] for t in (x.q, x.k))
        return flash_attn_varlen_func(q, k, x.v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest)

    return attend


def flash_attn_3() -> Callable:
    from flash_attn_interface import flash_attn_varlen_func

    rotate = torch.compile(rotate_half, dynamic=True)

    def attend(x: Inputs) -> Tensor:
        out = flash_attn_varlen_func(*rotated(x, rotate), x.v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest)
        return out[0] if isinstance(out, tuple) else out  # early releases return the lse as well

    return attend


def torch_varlen() -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    rotate = torch.compile(rotate_half, dynamic=True)

    def attend(x: Inputs) -> Tensor:
        return varlen_attn(*rotated(x, rotate), x.v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest)

    return attend


def flex() -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rotate, attention = torch.compile(rotate_half, dynamic=True), torch.compile(flex_attention)

    def block_mask(x: Inputs):
        tokens = x.q.shape[0]
        sequence = torch.bucketize(torch.arange(tokens, device=x.q.device), x.cu_seqlens[1:], right=True)
        return create_block_mask(lambda b, h, i, j: sequence[i] == sequence[j], None, None, tokens, tokens, x.q.device)

    def attend(x: Inputs) -> Tensor:
        mask = x.once("flex", lambda: block_mask(x))
        heads_first = (t.transpose(0, 1)[None] for t in (*rotated(x, rotate), x.v))
        return attention(*heads_first, block_mask=mask)[0].transpose(0, 1)

    return attend


def xformers() -> Callable:
    from xformers.ops import fmha

    rotate = torch.compile(rotate_half, dynamic=True)

    def attend(x: Inputs) -> Tensor:
        mask = x.once("xformers", lambda: fmha.BlockDiagonalMask.from_seqlens(list(x.lengths)))
        q, k, v = (t[None] for t in (*rotated(x, rotate), x.v))
        return fmha.memory_efficient_attention(q, k, v, attn_bias=mask)[0]

    return attend


def of_the_cpu_suite(peer: Callable) -> Callable:
    """A peer of benchmarks/attention_peers.py, which take tables of full width."""

    def attend(x: Inputs) -> Tensor:
        def prepare() -> Callable:
            cos, sin = (torch.cat((table, table), dim=-1) for table in (x.cos, x.sin))
            return peer(x, AttentionInputs(x.q, x.k, x.v, cos, sin, x.cu_seqlens))

        return x.once(peer.__name__, prepare)(x.q, x.k, x.v)

    return attend


PEERS: dict[str, tuple[str, Callable]] = {  # name -> (module that must be there, what returns attend(x))
    "flash-attn": ("flash_attn", flash_attn),
    "flash-attn 3": ("flash_attn_interface", flash_attn_3),
    "torch varlen": ("torch", torch_varlen),
    "flex": ("torch", flex),
    "xformers": ("xformers", xformers),
    "nested jagged": ("torch", lambda: of_the_cpu_suite(attention_peers.nested_jagged)),
    "SDPA per image": ("torch", lambda: of_the_cpu_suite(attention_peers.sdpa_loop)),
}


def available_candidates(device: str) -> tuple[dict[str, Callable], list[str]]:
    """(what can be timed by name, why the others cannot)."""
    candidates = {f"ours ({backend})": ours(backend) for backend in own_backends(device)}
    missing = []
    for name, (module, build) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            missing.append(f"{name}: {module} is not installed")
            continue
        try:
            candidates[name] = build()
        except ImportError as error:
            missing.append(f"{name}: {error}")
    return candidates, missing


@dataclass
class Result:
    workload: Workload
    candidate: str
    error: float  # largest, against the definition in float32
    forward: float  # milliseconds
    both: float  # forward and backward
    memory: float | None  # MiB above the inputs, forward and backward


def measure(
    workload: Workload, candidates: dict[str, Callable], timer: Callable, device: str
) -> tuple[list[Result], list[str]]:
    """Time all candidates on one workload, in turn, twice; (results, failures in words)."""
    x = make_inputs(workload, device, torch.bfloat16)
    cotangent = torch.randn_like(x.q)
    exact = ck.reference.rope_attention(x.q.float(), x.k.float(), x.v.float(), x.cos, x.sin, x.cu_seqlens)
    results, failures = {}, []
    for name, attend in candidates.items():
        try:
            with torch.no_grad():
                error = (attend(x).float() - exact).abs().max().item()
            memory = peak_memory(with_backward(attend, x, cotangent), device)
        except Exception as error:  # a peer that cannot serve this workload is a line in the report
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
            failures.append(f"{workload.name}, {name}: {reason}")
            continue
        results[name] = Result(workload, name, error, float("inf"), float("inf"), memory)
    del exact
    for _ in range(2):
        for name, result in results.items():
            with torch.no_grad():
                result.forward = min(result.forward, timer(lambda name=name: candidates[name](x)))
            result.both = min(result.both, timer(with_backward(candidates[name], x, cotangent)))
    return list(results.values()), failures


def peers(session: Session) -> None:
    timer = time_once
    if not session.tiny:
        from triton.testing import do_bench

        def timer(function):
            return do_bench(function, return_mode="median")

    candidates, missing = available_candidates(session.device)
    session.say(missing=missing)
    for workload in session.workloads:
        results, failures = measure(workload, candidates, timer, session.device)
        for result in results:
            session.say(workload=workload.name, candidate=result.candidate, forward_ms=result.forward, both_ms=result.both,
                        mib=result.memory, error=result.error)  # fmt: skip
        for failure in failures:
            session.say(failed=failure)
