"""Text rows through a decoder of transformers one after the other, without padding: tokens attend within their own row.

transformers hands `cu_seq_lens_q` and its relatives down to the attention function of every layer. Its flash attentions know
what they mean; its "sdpa" does not (it would build a mask of tokens x tokens), so a model of "sdpa" gets the function below,
which is "sdpa" itself for every other call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .causal_lm import Halves, evaluation_mode, probe_ids, rounding_of
from .generation import cache_layers, has_static_rope
from .row_sizes import over_filled_rows, slack_rows, with_slack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_packed"
SLIDING = "DynamicSlidingWindowLayer"
SHORT_ROW = 320
"""Tokens of a row up to which torch's attention on the CPU learns faster in float32 than in bfloat16, where each of the five
products of a head in the backward pass takes 40 to 80 us however short (torch 2.13, Intel Xeon with AMX, 9 heads of 64, both
passes: 0.6 against 1.7 ms at 64 tokens, 6.7 against 7.3 at 290, 57 against 38 at 1024)."""


def _varlen_attention() -> Callable[..., Any] | None:
    """torch's own flash attention over packed rows; None before torch 2.13, where it has no windows and no grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


VARLEN = _varlen_attention()
PLAIN_SETTINGS = {"scaling", "dropout", "position_ids", "use_cache"}
"""Settings of a call of attention that change nothing for rows without a cache."""


@dataclass(frozen=True)
class Rows:
    """Where the tokens of right-padded rows [B, L] lie once the T real ones are packed."""

    is_token: Tensor
    """[B, L] bool."""
    cu_seqlens: Tensor
    """[rows that are not empty + 1] int32 on the device of the model: row i owns the tokens cu_seqlens[i]:cu_seqlens[i + 1]."""
    longest: int
    index: Tensor
    """[1, T] int64: the place of each token in its row."""
    slack: int = 0
    """Rows of zeros behind the T tokens for the decoder to compute, which attention does not reach (comp.model.row_sizes)."""

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """From an attention mask [B, L], True on real tokens, which come first in every row."""
        is_token = mask.bool()
        lengths = is_token.sum(1)
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(is_token)
        bounds = F.pad(lengths[lengths > 0].cumsum(0), (1, 0)).to(torch.int32)
        index = places[is_token].unsqueeze(0)
        return cls(is_token, bounds, int(lengths.max()), index, slack_rows(index.shape[1], index.device))

    def packed(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [1, T + slack, ...]."""
        return with_slack(x[self.is_token], self.slack).unsqueeze(0)

    def arguments(self, learned: Tensor | None = None) -> dict[str, Any]:
        """What a decoder of transformers takes to keep the rows apart.

        learned:  [n] int64, increasing: the tokens whose last hidden states are wanted (`shorten_last_layer`).
        """
        arguments = dict(
            position_ids=with_slack(self.index, self.slack, dim=1),
            cu_seq_lens_q=self.cu_seqlens,
            cu_seq_lens_k=self.cu_seqlens,
            max_length_q=self.longest,
            max_length_k=self.longest,
        )
        return arguments if learned is None else arguments | dict(learned=learned)


def allow_packing(model: PreTrainedModel, halves: Halves) -> str | None:
    """Prepare a language model for packed rows; returns why its rows have to be padded, None where they have not.

    The configuration tells what only long rows show: states, attention in chunks, rotary tables that follow the longest row.
    The rest shows in two short rows decoded together and alone. A model that cannot pack stays as it was.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    implementation = config._attn_implementation or "eager"
    if reason := _state_or_chunks(config):
        return f"{name} has {reason}"
    if not has_static_rope(config):
        return f"the rotary tables of {name} follow the longest row"
    if implementation not in (NAME, "sdpa") and "flash" not in implementation:
        return f"attention {implementation!r} cannot keep packed rows apart; sdpa and flash_attention_2 can"
    if implementation == "sdpa":
        _register(packed_attention)
        _set_implementation(model, NAME)
    reason = _rows_kept_apart(model, halves, config)
    if reason is not None and implementation == "sdpa":
        _set_implementation(model, "sdpa")
    return None if reason is None else f"{name}: {reason}"


def shorten_last_layer(model: PreTrainedModel, halves: Halves) -> bool:
    """Let the last layer of a decoder that packs rows take the argument `learned` (`Rows.arguments`), with which it computes
    nothing behind the keys and values of the other tokens, and returns the hidden states of these alone. Usually a few in a
    hundred tokens are learned. False, and nothing is changed, where the layer is not made like Llama's."""
    layers = getattr(halves.decoder_of(model), "layers", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    own = model.config.get_text_config(decoder=True)._attn_implementation == NAME
    if last is None or not own or "forward" in vars(last):
        return False
    last.forward = MethodType(_last_layer, last)
    try:
        rows = Rows.of(torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=model.device))
        ids, learned = probe_ids(model, 10).unsqueeze(0), torch.tensor([1, 4, 5, 8], device=model.device)
        mask = attention_mask_for_packed(model)
        with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            last.train()  # a layer with dropout of its own is made in another way
            every, some = (
                halves.decode(model, input_ids=ids, attention_mask=mask, **rows.arguments(wanted))[0]
                for wanted in (None, learned)
            )
        rounding = rounding_of(every.dtype) if every.dtype in (torch.bfloat16, torch.float16) else 1e-5
        same = torch.allclose(some, every[learned], rtol=0, atol=rounding * every.abs().max().item())
    except Exception:  # a layer made in another way says so in any way
        same = False
    if not same:
        del last.forward
    return same


def _last_layer(layer: Any, hidden_states: Tensor, *args: Any, learned: Tensor | None = None, **settings: Any) -> Any:
    """The forward of a decoder layer of Llama, behind its attention for the tokens `learned` alone."""
    if learned is None:
        return type(layer).forward(layer, hidden_states, *args, **settings)
    normed = layer.input_layernorm(hidden_states)
    attended = layer.self_attn(hidden_states=normed, queries=learned, **settings)[0]
    x = hidden_states.index_select(1, learned) + attended.index_select(1, learned)
    return over_filled_rows(lambda x: x + layer.mlp(layer.post_attention_layernorm(x)), x, dim=1)


def attention_mask_for_packed(model: PreTrainedModel) -> Tensor | None:
    """What to pass as `attention_mask` with packed rows: nothing for flash attention; for the function below a mask that hides
    nothing, in the shape which transformers hands on as it is instead of making one of its own."""
    own = model.config.get_text_config(decoder=True)._attn_implementation == NAME
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device) if own else None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    queries: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed row, in the signature of transformers' attention functions.

    query:  [1, heads, T, head size]; key and value may have fewer heads. Returns [1, T, heads, head size]. On a CPU there
        may be tokens behind the last row, which are not read: their results are zeros.
    sliding_window:  tokens that a token sees, itself included.
    queries:  [n] int64, increasing: the tokens whose results are wanted; those of others may be anything finite.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("cu_seq_lens_k", "max_length_k", "learned"):
        settings.pop(name, None)
    settings |= dict(scaling=scaling, dropout=dropout)
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if VARLEN is not None and max_length_q is not None and _flash_serves(query, value, dropout):
        return _flash(VARLEN, query, key, value, cu_seq_lens_q, max_length_q, sliding_window, scaling), None
    return _row_by_row(module, query, key, value, cu_seq_lens_q, sliding_window, settings, queries), None


def _flash_serves(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's own flash attention over packed rows takes the call; not run on a GPU by the authors."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and dropout == 0 and query.shape[-1] == value.shape[-1] <= 256


def _flash(
    attention: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, head size]
    left = -1 if window is None else window - 1
    out = attention(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=True)
    return out.unsqueeze(0)


@torch.compiler.disable  # the number of rows changes with every batch: one graph cannot hold the loop
def _row_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    window: int | None,
    settings: dict[str, Any],
    queries: Tensor | None,
) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = bounds.diff().tolist()
    if _float32_is_faster(query, value, max(lengths)):
        with torch.autocast("cpu", enabled=False):
            wide = _row_by_row(module, query.float(), key.float(), value.float(), bounds, window, settings, queries)
        return wide.to(value.dtype)
    if queries is not None:
        return _of_queries(module, query, key, value, bounds, lengths, window, settings, queries)
    if _all_in_one(module, query, key, value, window, max(lengths), settings):
        scale = query.shape[-1] ** -0.5 if settings["scaling"] is None else settings["scaling"]
        return CausalRows.apply(query, key, value, lengths, scale)
    pieces = zip(*(_rows_of(x, lengths, dim=2) for x in (query, key, value)))
    outs = []
    for q, k, v in pieces:
        mask = None if window is None or q.shape[2] <= window else _window_mask(q.shape[2], window, q.device)
        outs.append(sdpa_attention_forward(module, q, k, v, mask, **settings)[0])
    return with_slack(torch.cat(outs, dim=1), query.shape[2] - sum(lengths), dim=1)


def _rows_of(x: Tensor, lengths: list[int], dim: int) -> tuple[Tensor, ...]:
    """Views of the rows, without what lies behind the last one. Not slices: the gradient of each is as large as `x`."""
    return x.split([*lengths, x.shape[dim] - sum(lengths)], dim)[:-1]


def _of_queries(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    lengths: list[int],
    window: int | None,
    settings: dict[str, Any],
    queries: Tensor,
) -> Tensor:
    """`_row_by_row` for some of the queries; zeros for the others."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    row = torch.bucketize(queries, bounds[1:], right=True)
    places = queries - bounds[row]
    counts = row.bincount(minlength=len(lengths)).tolist()
    pieces = zip(
        query.index_select(2, queries).split(counts, dim=2),
        places.split(counts),
        _rows_of(key, lengths, dim=2),
        _rows_of(value, lengths, dim=2),
    )
    outs = []
    for q, place, k, v in pieces:
        if q.shape[2]:
            distance = place.unsqueeze(1) - torch.arange(k.shape[2], device=place.device)
            seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            outs.append(sdpa_attention_forward(module, q, k, v, seen.expand(1, 1, -1, -1), **settings)[0])
    out = torch.cat(outs, dim=1)
    return out.new_zeros(1, query.shape[2], *out.shape[2:]).index_copy(1, queries, out)


def _all_in_one(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None, longest: int, settings: dict[str, Any]
) -> bool:
    """Whether `CausalRows` takes the call."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    plain = not settings["dropout"] and set(settings) <= PLAIN_SETTINGS and (window is None or longest <= window)
    causal = getattr(module, "is_causal", True)
    return query.device.type == "cpu" and same and plain and causal and not torch.is_autocast_enabled("cpu")


class CausalRows(torch.autograd.Function):
    """torch's attention on the CPU for rows of packed tokens, [1, heads, T, head size] -> [1, T, heads, head size].

    Made of the calls that scaled_dot_product_attention makes for each row. Results and gradients are put where they belong at
    once: autograd would keep every result twice, alone and behind the others.
    """

    @staticmethod
    def forward(ctx, query, key, value, lengths, scale):
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        out[:, sum(lengths) :].zero_()
        pieces = zip(_rows_of(out, lengths, dim=1), *(_rows_of(x, lengths, dim=2) for x in (query, key, value)))
        sums = []
        for to, q, k, v in pieces:
            result, logsumexp = attend(q, k, v, 0.0, True, scale=scale)
            to.copy_(result.transpose(1, 2))
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, *sums = ctx.saved_tensors
        inputs = (query, key, value)
        results = [torch.empty_like(x) for x in inputs]
        for x in results:
            x[:, :, sum(ctx.lengths) :].zero_()
        pieces = zip(
            zip(*(_rows_of(x, ctx.lengths, dim=2) for x in results)),
            *(_rows_of(x.transpose(1, 2), ctx.lengths, dim=2) for x in (grad, out)),
            *(_rows_of(x, ctx.lengths, dim=2) for x in inputs),
            sums,
        )
        for to, d, o, q, k, v, logsumexp in pieces:
            for place, result in zip(to, gradients(d, q, k, v, o, logsumexp, 0.0, True, scale=ctx.scale)):
                place.copy_(result)
        return *results, None, None


def _float32_is_faster(query: Tensor, value: Tensor, longest: int) -> bool:
    """Whether a call that torch would compute in bfloat16 on the CPU takes less time in float32, its backward pass included.
    Under autocast the rotation has made the query float32 again, and the value tells."""
    return value.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad and longest <= SHORT_ROW


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, length, length] bool: key j is seen by query i where i - window < j <= i."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)


def _register(function: Callable) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _set_implementation(model: PreTrainedModel, name: str) -> None:
    configs = [getattr(module, "config", None) for module in model.modules()]
    for config in {id(c): c for c in configs if c is not None}.values():
        config._attn_implementation = name


def _state_or_chunks(config: Any) -> str | None:
    if not set(cache_layers(config)) <= {"DynamicLayer", SLIDING}:
        return "layers that keep a state from token to token"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "attention_chunk_size", None):
        return "attention within chunks"
    return None


@torch.no_grad()
def _rows_kept_apart(model: PreTrainedModel, halves: Halves, config: Any) -> str | None:
    """What is wrong with two short rows decoded together; None where they are what they are alone."""
    ids = probe_ids(model, 6)
    first, second = ids.unsqueeze(0), ids.flip(0)[:4].unsqueeze(0)
    rows = Rows.of(torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=ids.device))
    windows: list[int | None] = []

    def noting(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        if "cu_seq_lens_q" in settings:
            windows.append(settings.get("sliding_window"))
        return packed_attention(module, query, key, value, mask, **settings)

    _register(noting)
    try:
        with evaluation_mode(model):
            alone = [halves.decode(model, input_ids=row, attention_mask=torch.ones_like(row))[0] for row in (first, second)]
            together = halves.decode(
                model,
                input_ids=torch.cat((first, second), dim=1),
                attention_mask=attention_mask_for_packed(model),
                **rows.arguments(),
            )[0]
    except Exception as error:  # a decoder that does not take these arguments says so in any way
        return f"its decoder does not take packed rows ({type(error).__name__}: {error})".splitlines()[0]
    finally:
        _register(packed_attention)
    expected = torch.cat(alone)
    rounding = rounding_of(expected.dtype) * expected.abs().max().item()
    if not torch.allclose(together, expected, rtol=0, atol=rounding, equal_nan=True):
        return "packed rows see each other"
    sliding = cache_layers(config).count(SLIDING)
    if config._attn_implementation == NAME and sum(window is not None for window in windows) != sliding:
        return "its attention is not told of the window that slides over its rows"
    return None
