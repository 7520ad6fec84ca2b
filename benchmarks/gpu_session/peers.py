"""Other libraries' attention on the workloads of rope_attention, after the rotation that their users would run before it.

Before all but flash-attention 2, which has a kernel of its own for it, torch.compile fuses the rotation of q and k into one
pass each, with the zeros that pad a head size where the library does not take it. FLOPs are those of the true head size.

A peer is `attend(q, k, v, x, scale)` -> out [T, H, D] for q, k turned already, all three perhaps padded; x: the packing.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .session import Session, peak_memory
from .workloads import Inputs, Workload, largest_error, make_inputs, ours, own_backends, with_backward, without_gradient

Attend = Callable[[Tensor, Tensor, Tensor, Inputs, float], Tensor]


def turned_half(x: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
    """What models do before they call an attention kernel: rotate in float32, round back. x [T, H, D], cos, sin [T, D / 2];
    zeros up to `width` channels."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return F.pad(turned, (0, width - x.shape[-1]))


@functools.cache
def rotation() -> Callable:
    torch._dynamo.config.recompile_limit = 64  # head sizes and widths; a new number of tokens needs no new code
    return torch.compile(turned_half, dynamic=True)


@dataclass
class Candidate:
    """attend(x) for one peer, with the padding that it turned out to need."""

    peer: Attend
    turns: bool = False  # q and k itself
    widths: dict[int, int] = field(default_factory=dict)  # head size -> what it is padded to

    def __call__(self, x: Inputs) -> Tensor:
        head_dim = x.q.shape[-1]
        scale, width = head_dim**-0.5, self.widths.get(head_dim, head_dim)
        if self.turns:
            return self.peer(x.q, x.k, x.v, x, scale)
        q, k = (rotation()(t, x.cos, x.sin, width) for t in (x.q, x.k))
        out = self.peer(q, k, F.pad(x.v, (0, width - head_dim)), x, scale)
        return out[..., :head_dim]

    def settle(self, x: Inputs) -> Tensor:
        """out, forward and backward having run once: with the head size as it is, else padded to the next multiple of 16 (72
        to 80), else to the next power of two."""
        head_dim, refusal = x.q.shape[-1], None
        widths = dict.fromkeys((head_dim, -(-head_dim // 16) * 16, 1 << (head_dim - 1).bit_length()))
        for width in [head_dim] if self.turns else widths:
            self.widths[head_dim] = width
            try:
                leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
                out = self(x)
                torch.autograd.grad(out.sum(), leaves)
                return out.detach()
            except Exception as error:
                refusal = refusal or error  # of the true head size
        raise refusal


# --- peers -------------------------------------------------------------------------------------------------------------------


def sdpa(*backends: SDPBackend) -> Attend:
    """torch's own, by the first of `backends` that takes the call: one for all images of one length, else one per image."""

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Inputs, scale: float) -> Tensor:
        with sdpa_kernel(list(backends), set_priority=True):
            if len(set(x.lengths)) == 1:
                q, k, v = (t.unflatten(0, (len(x.lengths), -1)).transpose(1, 2) for t in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
            images = zip(*(t.transpose(0, 1)[None].split(x.lengths, dim=2) for t in (q, k, v)))
            outs = [F.scaled_dot_product_attention(*image, scale=scale) for image in images]
            return torch.cat(outs, dim=2)[0].transpose(0, 1)

    return attend


def torch_varlen(cudnn: bool) -> Attend:
    """torch's varlen_attn by flash-attention 2, or by cuDNN, which torch has behind a function that says no."""
    if not hasattr(varlen, "_should_use_cudnn"):
        raise ImportError("this torch has no choice of cuDNN in varlen_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Inputs, scale: float) -> Tensor:
        varlen._should_use_cudnn = lambda device: cudnn  # the backward pass asks too
        return varlen.varlen_attn(q, k, v, x.cu_seqlens, x.cu_seqlens, x.longest, x.longest, scale=scale)

    return attend


def flash_varlen(function: Callable) -> Attend:
    """Any of flash-attention's releases by the arguments that they have in common."""

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Inputs, scale: float) -> Tensor:
        bounds = dict(cu_seqlens_q=x.cu_seqlens, cu_seqlens_k=x.cu_seqlens, max_seqlen_q=x.longest, max_seqlen_k=x.longest)
        out = function(q, k, v, **bounds, softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out  # some return the lse as well

    return attend


def flash_attn_2() -> Attend:
    from flash_attn import flash_attn_varlen_func
    from flash_attn.layers.rotary import apply_rotary_emb

    attention = flash_varlen(flash_attn_varlen_func)

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Inputs, scale: float) -> Tensor:
        # Its tables count positions within a sequence, so packed 2D tables go in as one long sequence. They stay float32, as
        # in the models; flash-attn releases that want them in the dtype of q say so, and that is then a line of the report.
        q, k = (apply_rotary_emb(t[None], x.cos, x.sin)[0] for t in (q, k))
        return attention(q, k, v, x, scale)

    return attend


def flash_attn_3() -> Attend:
    from flash_attn_interface import flash_attn_varlen_func

    return flash_varlen(flash_attn_varlen_func)


def flash_attn_4() -> Attend:
    from flash_attn.cute import flash_attn_varlen_func

    return flash_varlen(flash_attn_varlen_func)


def from_hub(repository: str) -> Callable[[], Attend]:
    """A build of Hugging Face's kernels, which is fetched where it is not in the cache."""

    def build() -> Attend:
        from kernels import get_kernel

        return flash_varlen(get_kernel(repository).flash_attn_varlen_func)

    return build


def xformers() -> Attend:
    from xformers.ops import fmha

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Inputs, scale: float) -> Tensor:
        mask = x.once("xformers", lambda: fmha.BlockDiagonalMask.from_seqlens(list(x.lengths)))
        return fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]

    return attend


def flex() -> Attend:
    """flex_attention, compiled anew for every packing: with dynamic shapes it ran into the limit of recompilations."""

    def prepare(x: Inputs) -> tuple:
        def same_image(b, h, i, j):
            return image[i] == image[j]

        tokens, device = x.q.shape[0], x.q.device
        image = torch.repeat_interleave(torch.arange(len(x.lengths)), torch.tensor(x.lengths)).to(device)
        torch.compiler.reset()  # what was compiled for the packing before counts against the limit
        mask = torch.compile(create_block_mask)(same_image, None, None, tokens, tokens, device)
        return torch.compile(flex_attention, dynamic=False), mask

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Inputs, scale: float) -> Tensor:
        attention, mask = x.once("flex", lambda: prepare(x))
        heads_first = (t.transpose(0, 1)[None] for t in (q, k, v))
        return attention(*heads_first, block_mask=mask, scale=scale)[0].transpose(0, 1)

    return attend


CUDNN, FLASH, OTHERS = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
PEERS: dict[str, tuple[str, Callable[[], Attend]]] = {  # name -> (module that must be there, what returns the peer)
    "SDPA, cuDNN first": ("torch", lambda: sdpa(CUDNN, FLASH, *OTHERS)),
    "SDPA, flash first": ("torch", lambda: sdpa(FLASH, *OTHERS)),
    "torch varlen, cuDNN": ("torch", lambda: torch_varlen(cudnn=True)),
    "torch varlen, flash": ("torch", lambda: torch_varlen(cudnn=False)),
    "flash-attn 2": ("flash_attn.layers.rotary", flash_attn_2),
    "flash-attn 3": ("flash_attn_interface", flash_attn_3),
    "flash-attn 4": ("flash_attn.cute", flash_attn_4),
    "flash-attn 3 of the hub": ("kernels", from_hub("kernels-community/flash-attn3")),
    "xformers": ("xformers", xformers),
    "flex": ("torch", flex),
}
SLOW_TO_COMPILE = ("flex",)  # a part of their own: tens of seconds per packing
GPU_ONLY = ("kernels",)  # not even asked for on the CPU, where it would go to the network for nothing


def installed(module: str) -> bool:
    """Whether a module can be found; asking for one within a package that is not there raises."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def available(names: list[str], device: str) -> tuple[dict[str, Candidate], dict[str, str]]:
    """(what can be timed, why the others cannot), by name."""
    found, missing = {}, {}
    for name in names:
        module, build = PEERS[name]
        if not installed(module) or (device == "cpu" and module in GPU_ONLY):
            missing[name] = f"{module} is not installed" if not installed(module) else f"{module} has nothing for the CPU"
            continue
        try:
            found[name] = Candidate(build(), turns=build is flash_attn_2)
        except Exception as error:  # a wheel for another torch, no network
            missing[name] = f"{type(error).__name__}: {error}"[:200]
    return found, missing


# --- measurements ------------------------------------------------------------------------------------------------------------


def peers(session: Session) -> None:
    """Ours and what does not take long to compile."""
    measure_all(session, [name for name in PEERS if name not in SLOW_TO_COMPILE])


def compiled_peers(session: Session) -> None:
    measure_all(session, list(SLOW_TO_COMPILE))


def measure_all(session: Session, names: list[str]) -> None:
    candidates, missing = available(names, session.device)
    for name, why in missing.items():
        session.say(failed=name, error=why)
    own = {f"ours ({backend})": ours(backend) for backend in own_backends(session.device)}
    for workload in session.workloads:
        session.guarded(workload.name, lambda workload=workload: measure(session, workload, own | candidates))


def measure(session: Session, workload: Workload, candidates: dict[str, Callable]) -> None:
    """One row: every candidate that serves the workload, forward and with the backward. us: CUDA events around an eager call,
    the host included where it is slower; device_us: sum of its kernels by torch's profiler; host_us: until the call returns."""
    x = make_inputs(workload, session.device, torch.bfloat16)
    cotangent = torch.randn_like(x.q)
    functions: dict[str, Callable] = {}
    columns: dict[str, dict] = {key: {} for key in ("device_us", "host_us", "mib", "error", "padded")}
    for name, attend in candidates.items():
        try:
            out = attend.settle(x) if isinstance(attend, Candidate) else attend(x).detach()
            columns["error"][f"{name}, forward"] = largest_error(out, x)
            forward, both = without_gradient(attend, x), with_backward(attend, x, cotangent)
            columns["mib"][f"{name}, both"] = peak_memory(both, session.device)
        except Exception as error:  # a peer that cannot serve this workload is a line in the report
            session.say(failed=f"{workload.name}, {name}", error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            continue
        functions |= {f"{name}, forward": forward, f"{name}, both": both}
        if isinstance(attend, Candidate) and attend.widths.get(workload.head_dim, workload.head_dim) != workload.head_dim:
            columns["padded"][f"{name}, forward"] = attend.widths[workload.head_dim]
    us = session.times(functions)
    for name, function in functions.items():
        columns["host_us"][name] = session.host_time(function)
        columns["device_us"][name] = round(sum(session.kernels(function).values()), 1)
    teraflops = {name: round(workload.flops("both" in name) / time / 1e6, 1) for name, time in us.items()}
    session.say(workload=workload.name, teraflops=teraflops, us=us, **columns)
