"""Answers to prompts that are embeddings, by `generate` of transformers; no answer depends on the other rows of its batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .causal_lm import probe_ids, rounding_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

PADDED, EQUAL_LENGTHS, ALONE = "padded", "equal lengths", "alone"
KNOWN_CACHES = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""Layers of transformers' DynamicCache that hold keys and values by their distance, or the state of a recurrence."""
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary tables of these are the same whatever the longest row of a batch is; "dynamic" and "longrope" follow it."""


def plain_config(max_new_tokens: int, stops: Sequence[int], options: dict[str, Any]) -> GenerationConfig:
    """Greedy answers that end at `stops`, changed by `options` (fields of transformers.GenerationConfig)."""
    from transformers import GenerationConfig

    ends = dict(eos_token_id=list(stops), pad_token_id=stops[0]) if stops else {}
    return GenerationConfig(max_new_tokens=max_new_tokens, **ends, **{"do_sample": False, **options})


def rows_together(sharing: str, lengths: Sequence[int]) -> list[list[int]]:
    """The rows of each call of `generate`, by what `sharing` allows."""
    keys = {PADDED: [0] * len(lengths), EQUAL_LENGTHS: lengths, ALONE: range(len(lengths))}[sharing]
    rows: dict[int, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return list(rows.values())


def continue_rows(
    model: PreTrainedModel, embeds: Tensor, input_ids: Tensor, lengths: Tensor, config: GenerationConfig, **arguments: Any
) -> Any:
    """What `model.generate` returns for right-padded prompts, which it gets padded on the left.

    embeds:     [B, L, E] what the decoder sees instead of the embeddings of input_ids.
    input_ids:  [B, L]; processors of logits and streamers read them.
    lengths:    [B] on the device of the ids.
    """
    from transformers import GenerationMixin

    if not isinstance(model, GenerationMixin):
        raise ValueError(f"{type(model).__name__} has no generate")
    longest = int(lengths.max())
    # where a row has no token it shows one of its own: a model that sees through the mask is found out by sharing_of
    places = torch.arange(longest, device=lengths.device) - (longest - lengths).unsqueeze(1)
    mask, places = places >= 0, places.clamp(min=0)
    embeds = embeds.gather(1, places.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
    with _own_settings_unused(model, config), _embedded_as(model, embeds):
        return model.generate(
            input_ids=input_ids.gather(1, places),
            attention_mask=mask.long(),
            generation_config=config,
            synced_gpus=False,  # each process asks its own questions
            **arguments,
        )


@contextmanager
def _embedded_as(model: PreTrainedModel, embeds: Tensor) -> Iterator[None]:
    """Let the prompt [B, L] have these embeddings [B, L, E]. `generate` takes inputs_embeds from some families only."""
    prompts = [embeds]

    def instead(module: nn.Module, arguments: tuple[Tensor, ...], looked_up: Tensor) -> Tensor | None:
        if not prompts:
            return None  # generated tokens
        prompt = prompts.pop()
        return prompt.repeat_interleave(len(looked_up) // len(prompt), dim=0).view_as(looked_up)  # several beams of each row

    handle = model.get_input_embeddings().register_forward_hook(instead)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _own_settings_unused(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` completes what it is given from the model's own generation_config: a released one samples and penalises."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def sharing_of(model: PreTrainedModel) -> str:
    """Which prompts may share a batch without changing an answer: PADDED (any, padded on the left), EQUAL_LENGTHS or ALONE.

    The configuration tells what only long prompts show: caches that choose what they keep, tables of positions that follow the
    longest row. The rest shows in two short prompts answered together and alone: padding that gets into the state of a
    recurrent or convolutional layer, positions that count it, states that are mixed up between rows.
    """
    config = model.config.get_text_config(decoder=True)
    if _caches_by_place(config) and has_static_rope(config) and _answers_alike(model, [6, 2]):
        return PADDED
    return EQUAL_LENGTHS if _answers_alike(model, [4, 4]) else ALONE


def _caches_by_place(config: Any) -> bool:
    return all(kind in KNOWN_CACHES for kind in cache_layers(config))


def cache_layers(config: Any) -> list[str]:
    """What transformers' cache keeps of each layer, by the names of its classes."""
    from transformers import DynamicCache

    return [type(layer).__name__ for layer in DynamicCache(config=config).layers]


def has_static_rope(config: Any) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    settings = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]  # one per kind of layer
    return all(s.get("rope_type", "default") in STATIC_ROPE_TYPES for s in settings)


@torch.no_grad()
def _answers_alike(model: PreTrainedModel, lengths: list[int]) -> bool:
    """Whether the second of two prompts gets the logits that it gets alone, for the first new token and the next."""
    ids = probe_ids(model, max(lengths))
    ids = torch.stack((ids, ids.flip(0)))
    counts = torch.tensor(lengths, device=ids.device)
    config = plain_config(2, [], dict(output_logits=True, return_dict_in_generate=True))
    embeds = model.get_input_embeddings()(ids)
    try:
        together = continue_rows(model, embeds, ids, counts, config).logits
    except Exception:  # a model that cannot be asked this way may say so in any way
        return False
    alone = continue_rows(model, embeds[1:], ids[1:], counts[1:], config).logits
    rounding = rounding_of(embeds.dtype)
    return all(
        torch.allclose(a[1:], b, rtol=0, atol=rounding * b.abs().max().item(), equal_nan=True) for a, b in zip(together, alone)
    )
