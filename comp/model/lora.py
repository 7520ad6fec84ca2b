"""LoRA (arXiv 2106.09685) through peft: low-rank updates put into a part of the model in place, merged into its matrices for an
export, and written as an adapter that peft loads onto the part they started from."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ConfigError, LoRAConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOWER_TARGETS = r".*blocks\.\d+\.(attn|mlp)\.\w+"
"""Every matrix of the blocks of a VisionEncoder."""
OUTSIDE_ADAPTER = r"(?!adapter\.)(.*\.)?"
"""Names of modules of a VisionEncoder up to the last part, without those of its 2x2 adapter: that trains whole."""
ADAPTER_NAME = "default"
MARK = ".lora_"
"""In the names of the parameters of updates, and of no other."""


def add_lora(
    part: nn.Module, settings: LoRAConfig, *, all_targets: str, names: str | None = None, base: str, field: str
) -> None:
    """Put updates beside the matrices that `settings` names; at first they add nothing.

    all_targets:  what no names in settings.targets stand for: a pattern of names of modules, or peft's "all-linear".
    names:        a pattern for what may stand in front of the names in settings.targets; None: anything.
    base:         what the part was loaded from, noted in the adapter's configuration.
    field:        of the run's configuration, for messages.
    Raises ConfigError where peft is not installed, and where no module has one of the names.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{field} needs peft: pip install 'comp-kernels[lora]' ({error})") from error
    targets: str | list[str] = list(settings.targets)
    if targets and names is not None:
        targets = f"{names}({'|'.join(map(re.escape, targets))})"
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type] # annotated as a whole number, which it need not be
        lora_dropout=settings.dropout,
        target_modules=targets or all_targets,
        base_model_name_or_path=base,
    )
    try:
        peft.inject_adapter_in_model(config, part, ADAPTER_NAME)
    except ValueError as error:
        raise ConfigError(f"{field}.targets: {error}") from error


def has_lora(part: nn.Module) -> bool:
    return any(MARK in name for name, _ in part.named_parameters())


def updates_words_apart(language_model: PreTrainedModel) -> bool:
    """Whether the table of words and the head have updates that are not the same: merged they are two matrices, whether they
    were one or not."""
    return any(hasattr(m, "lora_A") for m in (language_model.get_input_embeddings(), language_model.get_output_embeddings()))


def merged_state(part: nn.Module) -> dict[str, Tensor]:
    """The part's state_dict as it is with its updates added to their matrices. Nothing of the part changes."""
    state = dict(part.state_dict())
    for name, layer in part.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        own = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
        for key, tensor in own.items():
            if MARK in key:
                continue
            delta = layer.get_delta_weight(ADAPTER_NAME).to(tensor) if key.endswith(".weight") else None
            state[key.replace(".base_layer.", ".")] = tensor if delta is None else tensor + delta
    return state


def save_adapter(part: nn.Module, folder: str | os.PathLike) -> None:
    """adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained on what the part was loaded from.

    The rows that the table of words got for new special tokens are not in it: a merged model has them."""
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    vars(part)["peft_config"][ADAPTER_NAME].save_pretrained(folder)  # put there by inject_adapter_in_model
    tensors = get_peft_model_state_dict(part, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
