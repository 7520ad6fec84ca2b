"""Packed rows of text: loss and gradients are those of padded rows in every family, or the family is padded and says why."""

import copy
import re

import pytest
import torch
import transformers
from language_models import FAMILIES, LLAMA, make_language_model
from test_language_models import batch, make_model, text, with_image

from comp.model import CoMP, packed_rows
from comp.model.causal_lm import recompute_activations
from comp.model.packed_rows import NAME, CausalRows, Rows, packed_attention

PADDED_FAMILIES = {  # family: what the reason says, a pattern
    "Llama with dynamic rotary tables": "longest row",
    "Phi3, long rotary tables from 32 on": "longest row",
    "Gemma2, logits capped at 2, window 16": "'eager'",
    "VaultGemma, logits capped at 2": "'eager'",
    "FalconH1": "state",
    "Llama4, chunks of 16": "chunks",
    "Roberta as decoder, positions from two on": "see each other",
    "Bloom, biased by distance": "'eager'",
    "Mpt, biased by distance": "'eager'",
    "Falcon": "see each other",
    "Mamba": "state",
    "Mamba2": "state",
    "Rwkv": "'eager'",
    "RecurrentGemma, window 16": "state|see each other",  # its configuration does not tell until transformers 5.20
    "Qwen3Next": "state",
    "Lfm2, convolutions": "state",
}


def models(family, position_ids="1d"):
    """The same weights, packed (where they can be) and padded."""
    language_model = make_language_model(family)
    torch.manual_seed(1)
    packed = make_model(language_model, position_ids)
    padded = CoMP(
        copy.deepcopy(packed.encoder),
        make_language_model(family),
        image_token_id=packed.image_token_id,
        position_ids=position_ids,
        pack_rows=False,
    ).eval()
    return packed, padded


def loss_and_gradients(model, data):
    loss = model(data, per_sample=False).token_loss_sum
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(packed, padded, data):
    loss, gradients = loss_and_gradients(packed, data)
    expected, wanted = loss_and_gradients(padded, data)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in gradients.items():
        scale = 1e-4 * wanted[name].abs().max().item() + 1e-6 * largest  # the bias of keys has none but rounding
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=scale, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_packs_with_the_same_loss_and_gradients_or_says_why_not(family):
    """Rows of very different lengths, the longest beyond windows of 16, text alone and images."""
    packed, padded = models(family)
    if family in PADDED_FAMILIES:
        assert re.search(PADDED_FAMILIES[family], packed.padded_because)
        assert packed.language_model.config._attn_implementation != NAME, "what cannot pack stays as it was"
        return
    assert packed.padded_because is None and padded.padded_because
    assert_equal(packed, padded, batch([text(3, 1), with_image(40, 2), text(1, 3), text(23, 4), with_image(2, 5)]))


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral, window 16"])
def test_multimodal_positions_are_those_of_padded_rows(family):
    packed, padded = models(family, "mrope")
    assert_equal(packed, padded, batch([with_image(30, 1), text(4, 2), with_image(3, 3)]))


def test_texts_have_the_features_of_padded_rows():
    packed, padded = models("Qwen2")
    ids, mask = torch.randint(3, 90, (3, 9)), torch.tensor([[1] * 9, [0] * 9, [1] * 4 + [0] * 5]).bool()
    features = packed.text_features(ids, mask)
    torch.testing.assert_close(features, padded.text_features(ids, mask), rtol=1e-5, atol=1e-5)
    assert features[1].eq(0).all() and packed.text_features(ids, mask & False).eq(0).all()


def test_rows_recomputed_in_the_backward_pass_stay_apart():
    """Checkpointing runs the attention again, outside of every context of the first time."""
    packed, padded = models("Qwen2", "mrope")
    packed.train()
    recompute_activations(packed.language_model)
    packed.encoder.gradient_checkpointing = True
    assert_equal(packed, padded, batch([with_image(30, 1), text(4, 2), with_image(3, 3)]))


def test_attention_by_hand():
    """Against the definition in float64, with grouped heads and a window."""
    torch.manual_seed(0)
    lengths, window = [1, 7, 5], 3
    q, k, v = (torch.randn(1, heads, 13, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    for sliding in (None, window):
        out, _ = packed_attention(
            module, q, k, v, None, cu_seq_lens_q=bounds, max_length_q=7, sliding_window=sliding, scaling=0.5
        )
        row = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        distance = torch.arange(13)[:, None] - torch.arange(13)
        seen = (row[:, None] == row) & (distance >= 0) & (distance < (sliding or 13))
        scores = 0.5 * q @ k.repeat_interleave(2, 1).mT
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(out, expected.transpose(1, 2))
        for a, b in zip(torch.autograd.grad(out.sin().sum(), (q, k, v)), torch.autograd.grad(expected.sin().sum(), (q, k, v))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("length", "learns", "expected"), [(9, True, torch.float32), (9, False, None), (400, True, None)])
def test_short_rows_learn_in_float32_under_autocast(monkeypatch, length, learns, expected):
    """torch's bfloat16 attention has a slow backward pass for them; results keep the dtype that it would have given."""
    found = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noting(query, *args, **kwargs):
        found.append(torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype)
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    monkeypatch.setattr(packed_rows, "_all_in_one", lambda *_: False)  # its calls cannot be watched
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    rotated = torch.randn(2, 1, 2, length + 5, 8, requires_grad=learns)  # float32 again by the tables
    value = torch.randn(1, 2, length + 5, 8, dtype=torch.bfloat16, requires_grad=learns)
    with torch.autocast("cpu", torch.bfloat16):
        bounds = torch.tensor([0, 5, length + 5], dtype=torch.int32)
        out, _ = packed_attention(module, *rotated, value, None, cu_seq_lens_q=bounds, max_length_q=length)
    assert found == [expected or torch.bfloat16] * 2 and out.dtype == torch.bfloat16


def test_the_last_layer_computes_what_is_learned_and_no_more():
    """Of 70 tokens 12 are learned, in some rows none; windows of 16 hide what is further away."""
    packed, padded = models("Mistral, window 16", "mrope")
    data = batch([text(23, 4), with_image(20, 2), with_image(2, 5)])
    data.labels[0] = -100
    data.labels[1, :-9] = -100
    seen = []
    last = packed.language_model.get_decoder().layers[-1]
    handle = last.mlp.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[1]))
    assert_equal(packed, padded, data)
    handle.remove()
    assert seen == [int((data.labels[:, 1:] != -100).sum())]

    data.labels[:] = -100
    assert packed(data).token_loss_sum == 0, "nothing is learned, and the loss can still be differentiated"
    packed(data).token_loss_sum.backward()


def test_a_last_layer_of_another_kind_stays():
    for family in ("Cohere", "Gemma3, logits capped, window 16", "GPT2"):
        packed, _ = models(family)
        assert packed.padded_because is None and not packed._shortened
        assert "forward" not in vars(list(packed.language_model.modules())[1])
    drops = transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA, resid_pdrop=0.5)).eval()
    assert not make_model(drops)._shortened and not any(module.training for module in drops.modules())


def test_results_of_packed_attention_are_kept_once():
    kept = []
    q, k, v = (torch.randn(1, 2, 50, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        CausalRows.apply(q, k, v, [20, 30], 0.5)
    assert sum(kept) == 4 * q.numel() + 2 * 50


def test_rows_without_tokens_are_left_out():
    rows = Rows.of(torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]))
    assert rows.cu_seqlens.tolist() == [0, 2, 5] and rows.index.tolist() == [[0, 1, 0, 1, 2]] and rows.longest == 3


def test_a_window_that_attention_is_not_told_of_is_found_out(monkeypatch):
    """Six tokens do not show a window of 4096: the calls are counted."""
    attention = transformers.models.mistral.modeling_mistral.MistralAttention
    forward = attention.forward

    def forgetful(self, *args, **kwargs):
        self.config, config = copy.copy(self.config), self.config
        self.config.sliding_window = None
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config = config

    monkeypatch.setattr(attention, "forward", forgetful)
    assert "not told of the window" in make_model(make_language_model("Mistral, window 16")).padded_because
