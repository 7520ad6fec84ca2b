"""Any causal language model: CoMP's loss is the model's own, and answers are those of `generate` to each prompt alone."""

import pytest
import torch
import transformers
from language_models import FAMILIES, WORDS, make_language_model
from torch import nn

from comp.data.packing import EncodedSample, collate
from comp.model import CoMP, VisionEncoder
from comp.model.causal_lm import freeze, recompute_activations
from comp.model.generation import ALONE, EQUAL_LENGTHS, PADDED, sharing_of
from comp.model.vit_config import ViTConfig

IMAGE = WORDS - 1
TOWER = dict(family="siglip", width=32, num_layers=1, num_heads=2, mlp_width=64, patch_size=4, grid_size=4)


def make_model(language_model, position_ids="1d"):
    return CoMP(VisionEncoder(ViTConfig(**TOWER)), language_model, image_token_id=IMAGE, position_ids=position_ids).eval()


def text(length, seed=0):
    ids = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return EncodedSample(name="x", input_ids=ids, labels=ids, answer_ids=[], patches=[], grids=[], num_visual_tokens=0)


def with_image(length, seed=0):
    """Two by three visual tokens between the words."""
    sample = text(length, seed)
    ids = [*sample.input_ids[:2], *[IMAGE] * 6, *sample.input_ids[2:]]
    pixels = torch.randn(24, 48, generator=torch.Generator().manual_seed(seed))
    labels = [-100 if i == IMAGE else i for i in ids]
    return EncodedSample(
        name="x", input_ids=ids, labels=labels, answer_ids=[], patches=[pixels], grids=[(1, 4, 6)], num_visual_tokens=6
    )


def batch(samples):
    return collate(samples, pad_id=0, patch_features=48)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_models_own(family):
    language_model = make_language_model(family)
    sample = text(24)
    with torch.no_grad():
        output = make_model(language_model)(batch([sample]))
        ids = torch.tensor([sample.input_ids])
        expected = language_model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(output.token_loss_sum / output.num_tokens, expected, rtol=1e-5, atol=1e-5)


DROPPING = {
    "GPT2": (transformers.GPT2Config, dict(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
    "OPT": (
        transformers.OPTConfig,
        dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, dropout=0.5, layerdrop=0.5),
    ),
}


@pytest.mark.parametrize("family", DROPPING)
def test_what_is_frozen_drops_nothing_and_is_recomputed_all_the_same(family):
    kind, sizes = DROPPING[family]
    language_model = transformers.AutoModelForCausalLM.from_config(kind(vocab_size=WORDS, **sizes))
    model, data = make_model(language_model), batch([text(5, 1), with_image(9, 2)])

    def learn():
        """Loss, gradients of the adapter, and how many numbers are kept for them."""
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = model(data).token_loss_sum
        return loss, torch.autograd.grad(loss, list(model.adapter.parameters())), sum(kept)

    expected, gradients, kept = learn()
    model.train()
    assert learn()[0] != learn()[0]
    freeze(language_model)
    torch.testing.assert_close(learn(), (expected, gradients, kept))
    recompute_activations(language_model)
    model.train()
    assert learn()[0] != learn()[0]
    freeze(language_model)
    loss, recomputed, fewer = learn()
    torch.testing.assert_close((loss, recomputed), (expected, gradients))
    assert fewer < 0.7 * kept


@pytest.mark.parametrize("family", [name for name in FAMILIES if "capped" in name or "Granite" in name or "Cohere" in name])
def test_what_comes_after_the_head_counts(family):
    """Without it the loss is another one: the test above would not notice that nothing is there."""
    language_model = make_language_model(family)
    model, prompt = make_model(language_model), batch([text(24)])
    with torch.no_grad():
        hidden = model.decode(prompt, model.visual_tokens(prompt), model.token_grids(prompt))
        plain = language_model.get_output_embeddings()(hidden)
        assert (model.logits(hidden) - plain).abs().max() > 0.05 * plain.abs().max()


def test_gradients_are_the_models_own_in_any_number_of_chunks(monkeypatch):
    """Recomputed logits pass through the cap as well."""
    language_model = make_language_model("Gemma2, logits capped at 2, window 16")
    model, sample = make_model(language_model), text(24)
    parameters = list(language_model.parameters())
    ids = torch.tensor([sample.input_ids])
    expected = torch.autograd.grad(language_model(input_ids=ids, labels=ids).loss * 23, parameters)
    for logits_at_once in (2**25, 7 * WORDS):
        monkeypatch.setattr("comp.model.losses.next_token_loss.__defaults__", (logits_at_once,))
        gradients = torch.autograd.grad(model(batch([sample])).token_loss_sum, parameters)
        for gradient, wanted in zip(gradients, expected):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_a_forward_that_others_put_on_the_decoder_stays():
    """Libraries that offload or trace replace `forward` on the instance."""
    language_model = make_language_model("Granite")
    decoder, calls = language_model.model, []
    inner = decoder.forward

    def wrapped(*args, **kwargs):
        calls.append(None)
        return inner(*args, **kwargs)

    decoder.forward = wrapped
    model = make_model(language_model)
    calls.clear()
    with torch.no_grad():
        model(batch([text(9)]))
    assert decoder.forward is wrapped and len(calls) == 1


class ReadsIds(transformers.Qwen2ForCausalLM):
    """Adds to its logits what only token ids tell."""

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        if input_ids is not None:
            output.logits = output.logits + torch.sin(input_ids.float()).unsqueeze(-1)
        return output


class LooksAhead(transformers.Qwen2ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        causal = self.model.forward

        def forward(*args, **kwargs):
            output = causal(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.flip(1)
            return output

        self.model.forward = forward


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ReadsIds, {}, "ReadsIds cannot be .* from embeddings alone its logits are others"),
        (LooksAhead, {}, "LooksAhead cannot be .* its logits depend on tokens that follow, it is not causal"),
        (transformers.BertLMHeadModel, {}, "BertLMHeadModel cannot be .* it is not causal"),
        (
            transformers.MixtralForCausalLM,
            dict(output_router_logits=True),
            "on 6 tokens its own loss is .*set output_router_logits",
        ),
        (transformers.BartForCausalLM, {}, "BartForCausalLM cannot be .* labels that are shifted beforehand"),
    ],
)
def test_a_model_that_learns_something_else_is_refused_by_name(kind, changes, message):
    settings = dict(vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    if kind is transformers.BartForCausalLM:
        settings = dict(vocab_size=WORDS, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64)
    if kind is transformers.MixtralForCausalLM:
        settings.update(num_key_value_heads=1, num_local_experts=4)
    elif issubclass(kind, transformers.Qwen2ForCausalLM):
        settings.update(num_key_value_heads=1)
    language_model = kind(kind.config_class(**settings, **changes)).eval()
    for parameter in language_model.parameters():
        parameter.data.mul_(6)
    with pytest.raises(ValueError, match=message):
        make_model(language_model)


def own_answer(language_model, sample, count):
    ids = torch.tensor([sample.input_ids])
    settings = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    return language_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **settings)[
        0, ids.shape[1] :
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_the_other_rows(family):
    """Prompts beyond windows, chunks and the switch of rotary tables, and short ones."""
    language_model = make_language_model(family)
    model = make_model(language_model)
    samples = [text(length, seed) for seed, length in enumerate((60, 12, 33, 12, 3))]
    together = model.generate(batch(samples), max_new_tokens=8, eos_token_id=[])
    assert together == [model.generate(batch([sample]), max_new_tokens=8, eos_token_id=[])[0] for sample in samples]
    assert together == [own_answer(language_model, sample, 8).tolist() for sample in samples]
    assert len({tuple(answer) for answer in together}) > 1, "rows differ, or this would show nothing"


@pytest.mark.parametrize(
    ("family", "position_ids"),
    [
        ("Qwen2", "mrope"),
        ("Mistral, window 16", "mrope"),
        ("Granite", "mrope"),
        ("Llama with dynamic rotary tables", "mrope"),
        ("Gemma2, logits capped at 2, window 16", "mrope"),
        ("GPT2", "1d"),
        ("Mamba", "1d"),
        ("Rwkv", "1d"),
    ],
)
def test_answers_about_images_do_not_depend_on_the_other_rows(family, position_ids):
    """Against the whole row again for every token, and each row alone."""
    model = make_model(make_language_model(family), position_ids)
    samples = [with_image(40, seed=1), text(5, seed=2), with_image(9, seed=3)]
    together = model.generate(batch(samples), max_new_tokens=6, eos_token_id=[])
    for sample, answer in zip(samples, together):
        grown = list(sample.input_ids)
        for token in answer:
            longer = EncodedSample(
                name="x",
                input_ids=grown,
                labels=grown,
                answer_ids=[],
                patches=sample.patches,
                grids=sample.grids,
                num_visual_tokens=sample.num_visual_tokens,
            )
            one = batch([longer])
            with torch.no_grad():
                hidden = model.decode(one, model.visual_tokens(one), model.token_grids(one))
                assert model.logits(hidden[-1:]).argmax() == token
            grown.append(token)


@pytest.mark.parametrize(
    ("family", "sharing"),
    [
        ("Qwen2", PADDED),
        ("Mistral, window 16", PADDED),
        ("GPT2", PADDED),
        ("OPT", PADDED),
        ("Mamba2", PADDED),
        ("RecurrentGemma, window 16", EQUAL_LENGTHS),
        ("Llama with dynamic rotary tables", EQUAL_LENGTHS),
        ("Phi3, long rotary tables from 32 on", EQUAL_LENGTHS),
        ("Rwkv", ALONE),
    ],
)
def test_which_prompts_are_answered_together(family, sharing):
    """A slow path that nobody asked for would go unseen."""
    assert sharing_of(make_language_model(family)) == sharing


def test_the_models_own_generation_settings_do_not_change_a_greedy_answer():
    """Released instructed models sample and penalise repetitions by default."""
    language_model = make_language_model("Qwen2")
    model, prompt = make_model(language_model), batch([text(12), text(5)])
    expected = model.generate(prompt, max_new_tokens=12, eos_token_id=[])
    own = transformers.GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=5.0, eos_token_id=7)
    language_model.generation_config = own
    assert model.generate(prompt, max_new_tokens=12, eos_token_id=[]) == expected
    assert language_model.generation_config is own


def test_sampling_beams_and_streams():
    language_model = make_language_model("Qwen2")
    model = make_model(language_model, "mrope")
    prompt = batch([with_image(9), text(5)])
    greedy = model.generate(prompt, max_new_tokens=6, eos_token_id=[])
    sample = dict(do_sample=True, temperature=3.0, top_k=0)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, max_new_tokens=6, eos_token_id=[], **sample))
    assert drawn[0] == drawn[1] != drawn[2] and greedy not in drawn
    assert model.generate(prompt, max_new_tokens=6, eos_token_id=[], do_sample=True, top_k=1) == greedy
    beams = model.generate(prompt, max_new_tokens=6, eos_token_id=[], num_beams=3)
    assert beams == [
        model.generate(batch([one]), max_new_tokens=6, eos_token_id=[], num_beams=3)[0] for one in (with_image(9), text(5))
    ]

    class Streamer:
        def __init__(self):
            self.put_ids, self.ended = [], False

        def put(self, ids):
            self.put_ids += ids.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, one = Streamer(), with_image(9)
    answer = model.generate(batch([one]), max_new_tokens=6, eos_token_id=[], streamer=streamer)[0]
    assert streamer.put_ids == one.input_ids + answer and streamer.ended
    with pytest.raises(ValueError, match="streamer needs a batch of one row, got 2"):
        model.generate(prompt, max_new_tokens=6, streamer=Streamer())
    with pytest.raises(ValueError, match="num_return_sequences must be 1, got 2"):
        model.generate(prompt, max_new_tokens=6, num_return_sequences=2)
    with pytest.raises(ValueError, match=r"every row of input_ids must have a prompt, got lengths \[9, 0\]"):
        model.generate(batch([text(9), text(0)]), max_new_tokens=1)


def test_a_decoder_is_found_inside_a_wrapper():
    """As adapters of other libraries wrap a model: its decoder is not at the top."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self._modules["inner"], name)

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    language_model = make_language_model("Granite")
    plain, wrapped = make_model(language_model), make_model(Wrapper(language_model))
    with torch.no_grad():
        assert torch.equal(wrapped(batch([text(9)])).token_loss_sum, plain(batch([text(9)])).token_loss_sum)
