"""Vision towers of transformers and timm end to end, all layers of released widths: images per second, patched and not.

Unpatched they run with torch's sdpa, and with flash-attention where it is installed and the library knows it. Weights are
random: time does not depend on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import integrations

from .session import Session, peak_memory

LAYERS = {"siglip": 27, "siglip2": 12, "qwen2_5_vl": 32, "dinov3": 12, "naflexvit": 12, "pixtral": 24}
TINY = dict(GRIDS=((4, 6), (2, 4)), PHOTOGRAPH=(4, 6), SQUARES=1)


def towers(session: Session) -> None:
    sizes = TINY if session.tiny else {}
    with mock.patch.multiple(integrations, **sizes):
        for name, layers in LAYERS.items():
            session.guarded(name, lambda name=name, layers=layers: measure(session, name, 1 if session.tiny else layers))


def measure(session: Session, name: str, layers: int) -> None:
    """One row: every variant of one tower, bfloat16 (float32 in a dry run: without instructions for it, bfloat16 gradients
    of these widths take a CPU minutes); difference: of the patched output from the unpatched, relative to it, and beside it
    that of the unpatched one from float32, which is what bfloat16 costs."""
    torch.manual_seed(0)
    tower = integrations.TOWERS[name](layers)
    inputs = {key: x.to(session.device) if isinstance(x, Tensor) else x for key, x in tower.inputs.items()}
    exact = hidden(tower.model.to(session.device).eval(), inputs)
    dtype = torch.float32 if session.tiny else torch.bfloat16
    inputs = {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    model = tower.model.to(dtype)
    functions: dict[str, Callable] = {}
    memory, outputs = {}, {}
    for variant, one in variants(session, name, tower, model).items():
        try:
            outputs[variant] = hidden(one, inputs)
            forward, both = forward_of(one, inputs), training_of(one, inputs)
            memory[f"{variant}, training"] = peak_memory(both, session.device)
        except Exception as error:
            session.say(failed=f"{name}, {variant}", error=f"{type(error).__name__}: {error}"[:300])
            continue
        functions |= {f"{variant}, forward": forward, f"{variant}, training": both}
    us = session.times(functions, 5)
    images = {variant: round(tower.images / time * 1e6, 1) for variant, time in us.items()}
    difference = {f"{variant}, forward": distance(out, exact) for variant, out in outputs.items()}
    session.say(tower=tower.title, layers=layers, images_per_s=images, ms={k: t / 1e3 for k, t in us.items()}, mib=memory,
                difference=difference)  # fmt: skip


def variants(session: Session, name: str, tower: integrations.Tower, model: nn.Module) -> dict[str, nn.Module]:
    patched = copy.deepcopy(model)
    tower.patch(patched)
    found = {"patched": patched, "unpatched, sdpa": model}
    if hasattr(model, "set_attn_implementation"):
        flash = copy.deepcopy(model)
        if session.guarded(f"{name}, flash-attention", lambda: use_flash(flash)):
            found["unpatched, flash-attention"] = flash
    return found


def use_flash(model: nn.Module) -> bool:
    model.set_attn_implementation("flash_attention_2")
    return True


def hidden(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        return integrations.hidden_state(model(**inputs)).float()


def distance(out: Tensor, exact: Tensor) -> float:
    return float((out - exact).norm() / exact.norm())


def forward_of(model: nn.Module, inputs: dict) -> Callable:
    def forward():
        with torch.no_grad():
            model(**inputs)

    return forward


def training_of(model: nn.Module, inputs: dict) -> Callable:
    def both():
        model.zero_grad(set_to_none=True)
        integrations.hidden_state(model(**inputs)).float().sum().backward()

    return both
