"""How much work samples are, in floating-point operations: for the shares of the processes and for the utilisation of devices.

Only products of matrices are counted, two operations per multiply-add, of the model as it is defined: nothing for recomputed
activations, norms, softmax and rotation. A causal row of n tokens has n (n + 1) / 2 pairs of query and key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data.batch import Batch
from ..model.causal_lm import word_embeddings
from ..model.multimodal import CoMP

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BF16_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
}
"""Dense bfloat16 of one device by a part of its name, TFLOP/s, from NVIDIA's data sheets (figures without sparsity)."""


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass, per unit. Small numbers only: it travels to the workers that read data."""

    language_token: float
    language_pair: float
    logit_row: float
    """Per token whose successor is learned."""
    vision_patch: float
    vision_pair: float
    """Per pair of patches of an image."""
    visual_token: float
    """Adapter."""
    patches_per_token: int

    @classmethod
    def of(cls, model: CoMP) -> Work:
        vision, config = model.encoder.config, model.language_model.config.get_text_config(decoder=True)
        words = word_embeddings(model.language_model).weight
        heads = getattr(config, "num_attention_heads", None) or 0  # state-space models have none
        head_dim = (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
        return cls(
            language_token=2 * _active(model.language_model, config),
            language_pair=4 * heads * head_dim * config.num_hidden_layers,  # scores and values
            logit_row=2 * words.numel(),
            vision_patch=2 * _matrices(model.encoder.blocks) + 2 * _matrices(model.encoder.patch_embed),
            vision_pair=4 * vision.width * vision.num_layers,
            visual_token=2 * _matrices(model.adapter),
            patches_per_token=vision.merge_size**2,
        )

    def language(self, lengths: Iterable[int]) -> float:
        """Of the decoder, for rows of these lengths."""
        return sum(n * self.language_token + n * (n + 1) / 2 * self.language_pair for n in lengths)

    def vision(self, patches: Iterable[int]) -> float:
        """Of the tower, for images of so many patches."""
        return sum(n * self.vision_patch + n * n * self.vision_pair for n in patches)

    def sample(self, text_tokens: int, patches: Sequence[int]) -> float:
        """About what one sample costs: a row of text and visual tokens, and its images."""
        visual = sum(patches) // self.patches_per_token
        return self.language([text_tokens + visual]) + self.vision(patches) + visual * self.visual_token

    def step(self, batches: Sequence[Batch], trainable: Sequence[str], *, text_again: bool) -> float:
        """Of an optimiser step on these batches: forward, gradients of activations as far back as something trains, gradients
        of weights that train. text_again: the alignment loss reads the answers once more, without gradients."""
        tower = adapter = 0.0
        learned = 0
        rows: list[int] = []
        for batch in batches:
            patches = batch.grid_thw.prod(1).tolist()
            tower += self.vision(patches)
            adapter += self.visual_token * sum(patches) / self.patches_per_token
            rows += batch.attention_mask.sum(1).tolist()
            learned += batch.num_learned_tokens()
        language = self.language(rows) + learned * self.logit_row
        total = tower * (3 if "vision" in trainable else 1)
        total += adapter * (1 + ("adapter" in trainable) + ("vision" in trainable))
        total += language * (2 + ("language" in trainable))  # back to the adapter at least, or to its own first layer
        if text_again:
            total += sum(self.language(batch.answer_mask.sum(1).tolist()) for batch in batches)
        return total


def peak_flops(named: float | None, device: torch.device, *, bf16: bool) -> float | None:
    """Operations per second of one device at best: what the configuration says in TFLOP/s, or of a known GPU in bfloat16."""
    if named is not None:
        return named * 1e12
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in BF16_TFLOPS.items() if part in name), None)


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _active(model: PreTrainedModel, config: object) -> float:
    """Weights that multiply a token in the decoder: without the words and the head, of experts those that are chosen."""
    tables = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in tables:
            total += parameter.numel() * (share if ".experts." in name else 1.0)
    return total
