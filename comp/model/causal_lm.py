"""A transformers causal language model as the two halves that CoMP needs: a decoder, from embeddings to last hidden states, and
a head, from hidden states to logits as the model itself makes them."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .folder import check_weights, read_object, warn_of_non_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 6


@dataclass(frozen=True)
class Halves:
    """Where a language model is cut in two. Nothing of the model is copied or wrapped."""

    decoder: str
    """Name of the decoder among the model's modules."""
    output: type
    """What the decoder returns: a ModelOutput with `last_hidden_state`."""
    vocabulary: int
    """Logits per token."""
    head_is_linear: bool = False
    """Logits are `get_output_embeddings()` of the hidden states and nothing else."""

    def decoder_of(self, model: PreTrainedModel) -> nn.Module:
        return model.get_submodule(self.decoder)

    def decode(self, model: PreTrainedModel, **inputs: Any) -> Tensor:
        """Last hidden states [B, L, E] as the head takes them, from `inputs_embeds` or `input_ids`, and `attention_mask`."""
        return self.decoder_of(model)(use_cache=False, **inputs).last_hidden_state

    def logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Hidden states [n, E] -> logits [n, vocabulary], by the model's own forward with the decoder left out: the scales,
        caps and layers that a family has between its decoder and its loss are all in it."""
        hidden = hidden.unsqueeze(0)
        with _returning(self.decoder_of(model), self.output(last_hidden_state=hidden)):
            return model(inputs_embeds=hidden, use_cache=False).logits[0]

    def linear_head(self, model: PreTrainedModel) -> nn.Linear | None:
        """The layer that makes logits of hidden states, where nothing else has a part in them and nobody has changed it."""
        head = model.get_output_embeddings()
        plain = type(head) is nn.Linear and "forward" not in vars(head) and not (head._forward_hooks or head._forward_pre_hooks)
        return head if self.head_is_linear and plain else None


def load_language_model(path: str | os.PathLike, dtype: torch.dtype | str, *, attention: str | None = None) -> PreTrainedModel:
    """The causal language model of a directory or hub id, with an attention of transformers by name. ValueError with path and
    cause for what cannot be loaded, weights that lack tensors included; weights that are not finite are warned of."""
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    if (folder / "config.json").is_file():
        check_weights(folder, quantized=bool(read_object(folder / "config.json").get("quantization_config")))
    try:
        # a pair, which transformers' annotations do not know
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except Exception as error:  # configurations of wrong values and damaged files end in errors of any kind
        raise ValueError(f"{path}: {error or type(error).__name__}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{path}: the weights of {type(model).__name__} lack {len(missing)} tensors: {', '.join(missing[:5])}")
    warn_of_non_finite(path, model.named_parameters())
    return model


def apply_liger(model: PreTrainedModel) -> None:
    """Put Liger's RMSNorm and SwiGLU into a model. ValueError where the package is missing or does not know the model."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError("liger=true needs the package liger-kernel (pip install liger-kernel)") from error
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if patch is None:
        raise ValueError(f"liger=true: liger-kernel has no kernels for {model.config.model_type!r}")
    known = inspect.signature(patch).parameters
    wanted = dict(rms_norm=True, swiglu=True, geglu=True)
    others = dict(rope=False, cross_entropy=False, fused_linear_cross_entropy=False)  # M-RoPE and the loss are this project's
    patch(model=model, **{name: value for name, value in {**wanted, **others}.items() if name in known})


def word_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The table of words, [vocabulary, E]."""
    return cast(nn.Embedding, model.get_input_embeddings())


@torch.no_grad()
def split(model: PreTrainedModel) -> Halves:
    """Find the halves, and check on a few tokens that together they have the logits and the next-token loss of the model.

    Raises ValueError where they have not: the model reads more than embeddings (token ids beside them), is not causal, or
    learns from another loss than that of the next token (a router's, or labels that are not shifted).
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        # as transformers 5.20 chooses, all that Python 3.10 gets; newer ones choose or refuse as this does
        warnings.warn(f"attention is 'eager': 'sdpa' leaves out the cap on the scores of {name}", stacklevel=3)
        model.set_attn_implementation("eager")
    try:
        return _checked(model)
    except Exception as error:  # a model that cannot be used says so in any way it likes
        raise ValueError(f"{name} cannot be the language model of a CoMP: {error}") from error


def _checked(model: PreTrainedModel) -> Halves:
    ids = probe_ids(model, PROBE_TOKENS).unsqueeze(0)
    mask = torch.ones_like(ids)
    with evaluation_mode(model):
        with _outputs_with_hidden_states(model) as decoders:
            own = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        if not decoders:
            raise ValueError("none of its modules returns last_hidden_state")
        decoder, output = decoders[-1]  # the outermost ends last
        halves = Halves(decoder, output, own.logits.shape[-1])
        embeds = word_embeddings(model)(ids)
        hidden = halves.decode(model, inputs_embeds=embeds, attention_mask=mask)[0]
        logits = halves.logits(model, hidden)
        shorter = halves.decode(model, inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1])[0]
        causal = halves.logits(model, shorter)
    rounding = rounding_of(logits.dtype) * own.logits.abs().max().item()
    if not _close(logits, own.logits[0], rounding):
        raise ValueError("from embeddings alone its logits are others than from token ids")
    if not _close(causal, logits[:-1], 10 * rounding):  # of other shapes, hence rounded otherwise
        raise ValueError("its logits depend on tokens that follow, it is not causal")
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and torch.equal(head(hidden), logits)
    loss = F.cross_entropy(own.logits[0, :-1].float(), ids[0, 1:])
    if not _close(loss, own.loss, 1e-4 * max(1.0, loss.item())):
        raise ValueError(
            f"on {ids.shape[1]} tokens its own loss is {own.loss:.4f}, the next-token loss {loss:.4f}; the loss of a router is "
            "not learned (set output_router_logits to false in its config.json), nor one of labels that are shifted beforehand"
        )
    return replace(halves, head_is_linear=plain)


def probe_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Token ids spread over the vocabulary, without those of padding and the like where there are others."""
    embedding = word_embeddings(model)
    config = model.config.get_text_config()
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    special = {i for ids in named for i in (ids if isinstance(ids, (list, tuple)) else [ids])}
    ordinary = [i for i in range(embedding.num_embeddings) if i not in special] or [0]
    spread = [ordinary[i * (len(ordinary) - 1) // (count - 1)] for i in range(count)]
    return torch.tensor(spread, device=embedding.weight.device)


def rounding_of(dtype: torch.dtype) -> float:
    """How far apart two ways to the same logits may be, relative to the largest of them."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance, equal_nan=True)


@contextmanager
def _outputs_with_hidden_states(model: nn.Module) -> Iterator[list[tuple[str, type]]]:
    """The (name, type of output) of each module within that returns `last_hidden_state`, in the order in which they end."""
    found: list[tuple[str, type]] = []

    def noting(name: str):
        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            if getattr(output, "last_hidden_state", None) is not None:
                found.append((name, type(output)))

        return note

    handles = [module.register_forward_hook(noting(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return `output` whatever it is given; a forward that others put on the instance comes back afterwards."""
    absent = object()
    before = vars(module).get("forward", absent)
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is absent:
            del module.forward
        else:
            module.forward = before


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep the inputs of the layers alone for the backward pass.

    transformers recomputes a layer in training mode alone, where some drop activations by themselves (OPT): here a layer
    runs in the mode of its parts.
    """
    # the second is the name in older releases of transformers; newer ones warn about it
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for layer in _recomputed(model):
        layer._gradient_checkpointing_func = partial(_recompute, layer, layer._gradient_checkpointing_func)


def _recomputed(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


def _recompute(layer: nn.Module, checkpoint: Callable[..., Any], run: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(partial(_in_mode_of_parts, layer, run), *inputs)


def _in_mode_of_parts(layer: nn.Module, run: Callable[..., Any], *inputs: Any) -> Any:
    with nullcontext() if any(part.training for part in layer.children()) else evaluation_mode(layer):
        return run(*inputs)


def freeze(model: PreTrainedModel) -> None:
    """Evaluation mode, in which the layers are recomputed as before."""
    model.eval()
    for layer in _recomputed(model):
        layer.training = True


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off for a while, and restore what each submodule had."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training
