"""The optimiser: every trainable parameter in exactly one group (part x decay), and the learning-rate schedule.

`model.named_parts()` gives the parameters of "vision", "adapter" and "language" by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..config import OptimConfig
from ..model.causal_lm import freeze
from ..model.lora import MARK as LORA
from ..model.multimodal import CoMP


@dataclass(kw_only=True, slots=True)
class PartReport:
    """What one part of the model contributes to training."""

    part: str
    num_parameters: int
    num_trainable: int
    lr: float


def set_trainable(model: CoMP, trainable: Iterable[str]) -> None:
    """Switch gradients on for what learns of the named parts, off for all else."""
    trainable = set(trainable)
    for part, parameters in model.named_parts().items():
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for parameter in learning(parameters) if part in trainable else ():
            parameter.requires_grad_(True)


def train_mode(model: CoMP, trainable: Iterable[str]) -> None:
    """Training mode for the named parts, evaluation mode for the others: what is frozen drops nothing."""
    trainable = set(trainable)
    model.train()
    model.encoder.train("vision" in trainable)
    model.adapter.train("adapter" in trainable)
    if "language" not in trainable:
        freeze(model.language_model)


def learning(parameters: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    """Of the parameters of a part, by name, those that learn where the part trains: all of them, or LoRA's updates alone."""
    return [p for name, p in parameters.items() if LORA in name] or list(parameters.values())


def build_optimizer(model: CoMP, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; groups carry "part" and their peak rate "peak_lr"."""
    groups = []
    for part, parameters in model.named_parts().items():
        trainable = [(p, decays(model, name, p)) for name, p in parameters.items() if p.requires_grad]
        matrices = [p for p, decayed in trainable if decayed]
        others = [p for p, decayed in trainable if not decayed]
        for params, weight_decay in ((matrices, config.weight_decay), (others, 0.0)):
            if params:
                lr = config.lr(part)
                groups.append(dict(params=params, part=part, peak_lr=lr, lr=lr, weight_decay=weight_decay))
    check_partition(model, groups)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def check_partition(model: nn.Module, groups: Iterable[dict]) -> None:
    """Each parameter that requires a gradient is in exactly one group with a positive rate, and no other one is in any."""
    times: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            times[id(parameter)] = times.get(id(parameter), 0) + 1
        if not group["peak_lr"] > 0:
            raise ValueError(f"part {group['part']} trains with learning rate {group['peak_lr']}")
    for name, parameter in model.named_parameters():
        needed = 1 if parameter.requires_grad else 0
        found = times.pop(id(parameter), 0)
        if found != needed:
            raise ValueError(f"parameter {name} must be in {needed} optimiser group(s), found in {found}")
    if times:
        raise ValueError(f"the optimiser holds {len(times)} parameters that are not the model's")


def decays(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter of the model: on matrices that multiply activations and on the table of words.

    Not on biases, norm weights and scales, nor on what is added or put into a sequence as it is: tables of positions, CLS,
    registers, mask tokens, queries, states. Those are parameters of a module by any name, or rows of an embedding; a matrix is
    the `weight` of its module, or called a projection (the stacked experts of transformers).
    """
    owner, _, leaf = name.rpartition(".")
    if parameter.dim() < 2 or "pos" in name:
        return False
    module = model.get_submodule(owner)
    if isinstance(module, nn.Embedding):
        return module is _words(model, module)
    return leaf.endswith(("weight", "proj"))


def _words(model: nn.Module, embedding: nn.Embedding) -> nn.Module:
    """The table of words of the language model; a model without one has no other embeddings."""
    language_model = getattr(model, "language_model", None)
    return embedding if language_model is None else language_model.get_input_embeddings()


def part_reports(model: CoMP, config: OptimConfig) -> list[PartReport]:
    reports = []
    for part, parameters in model.named_parts().items():
        trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
        reports.append(
            PartReport(
                part=part,
                num_parameters=sum(p.numel() for p in parameters.values()),
                num_trainable=trainable,
                lr=config.lr(part) if trainable else 0.0,
            )
        )
    return reports


def lr_multiplier(step: int, num_steps: int, config: OptimConfig) -> float:
    """Share of the peak rate in step `step` (from 0): linear warm-up that reaches 1, then half a cosine to `min_lr_ratio`.

    With `warmup_from_zero` the first step has rate 0 and the peak comes right after the warm-up, as in Hugging Face's
    get_cosine_schedule_with_warmup.
    """
    num_warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < num_warmup:
        return (step if config.warmup_from_zero else step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Set every group to `multiplier` times its peak; returns the rate of each part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    return {group["part"]: group["lr"] for group in optimizer.param_groups}
