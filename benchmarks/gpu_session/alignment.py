"""alignment_loss in five precisions beside the plain reference and Liger, with peak memory, and as a CUDA graph."""

from __future__ import annotations

import torch

import comp_kernels as ck
from benchmarks.alignment_peers import liger

from .session import Session, backends_of, peak_memory

SHAPES = ((256, 151936, 896), (2048, 49152, 576))  # n, V, D
TINY_SHAPES = ((5, 40, 16),)
PRECISIONS = {  # torch.set_float32_matmul_precision, dtype of features, of prototypes
    "float32": ("highest", torch.float32, torch.float32),
    "tf32": ("high", torch.float32, torch.float32),
    "float32, bfloat16 prototypes": ("highest", torch.float32, torch.bfloat16),
    "bfloat16": ("highest", torch.bfloat16, torch.bfloat16),
    "float16": ("highest", torch.float16, torch.float16),
}


def alignment(session: Session) -> None:
    before = torch.get_float32_matmul_precision()
    for shape in TINY_SHAPES if session.tiny else SHAPES:
        for name, (setting, features, prototypes) in PRECISIONS.items():
            torch.set_float32_matmul_precision(setting)
            what = (session, shape, name, features, prototypes)
            session.guarded(f"{shape} {name}", lambda what=what: alignment_times(*what))
            torch.set_float32_matmul_precision(before)


def alignment_times(session: Session, shape: tuple[int, int, int], precision: str, features, prototypes) -> None:
    """Ours, the plain version and Liger in one precision, forward and backward; ours as a CUDA graph too."""
    n, words, width = shape
    vision, text = (torch.randn(n, width, device=session.device, dtype=features) for _ in range(2))
    prototypes = torch.randn(words, width, device=session.device, dtype=prototypes)
    vision.requires_grad_()
    functions, memory = {}, {}
    for backend in backends_of("alignment_loss", session):

        def gradient(backend=backend):
            return torch.autograd.grad(ck.alignment_loss(vision, text, prototypes, backend=backend), vision)

        def measured(gradient=gradient):
            gradient()
            return peak_memory(gradient, session.device)

        functions[backend] = gradient
        memory[backend] = session.guarded(f"{precision} {backend} memory", measured)
        if backend != "reference":
            graph = session.guarded(f"{precision} {backend} graph", lambda gradient=gradient: session.graph(gradient))
            if graph is not None:
                functions[f"{backend}, graph"] = graph
    if not session.tiny and vision.dtype == prototypes.dtype:
        peer = session.guarded(f"{precision} liger", lambda: liger(vision, text, prototypes, 0.05))
        if peer is not None and session.guarded(f"{precision} liger", peer) is not None:
            functions["liger, mode softmax"] = peer
    session.say(shape=shape, precision=precision, us=session.times(functions, 5), mib=memory)
