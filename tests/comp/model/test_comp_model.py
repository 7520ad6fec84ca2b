"""CoMP: losses and answers of mixed batches, against the same thing done sample by sample with plain transformers calls."""

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F
import transformers

import comp_kernels
from comp import CoMP, VisionEncoder
from comp.config import AlignmentConfig
from comp.data.batch import Batch
from comp.model import Adapter, StepText, ViTConfig

IMAGE, PATCH_DIM = 5, 48


def make_encoder() -> VisionEncoder:
    tower = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=80, patch_size=4, image_size=24)
    encoder = VisionEncoder(ViTConfig.from_hugging_face({"model_type": "siglip_vision_model", **tower}, pos_mode="abs+rope"))
    encoder.reset_parameters(std=0.2)
    return encoder


@pytest.fixture
def model(language_model) -> CoMP:
    return CoMP(make_encoder(), language_model, image_token_id=IMAGE)


def placeholders(*grids):
    return [[6, *[IMAGE] * (t * h * w // 4), 7] for t, h, w in grids]


def make_batch(samples) -> Batch:
    """samples: (ids, labels or None for all of them, grids, answer ids) of each."""
    length, answer_length = max(len(s[0]) for s in samples), max(len(s[3]) for s in samples)
    grids = [grid for s in samples for grid in s[2]]

    def pad(rows, width, value):
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long).view(len(rows), width)

    ids = pad([s[0] for s in samples], length, 0)
    mask = pad([[1] * len(s[0]) for s in samples], length, 0).bool()
    learned = mask & (ids != IMAGE)
    patches = [torch.randn(t * h * w, PATCH_DIM, generator=torch.Generator().manual_seed(t + 7 * h + w)) for t, h, w in grids]
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=torch.where(learned, ids, -100),
        pixel_values=torch.cat([torch.zeros(0, PATCH_DIM), *patches]),
        grid_thw=torch.tensor(grids, dtype=torch.long).view(-1, 3),
        image_sample=torch.tensor([i for i, s in enumerate(samples) for _ in s[2]], dtype=torch.long),
        answer_ids=pad([s[3] for s in samples], answer_length, 0),
        answer_mask=pad([[1] * len(s[3]) for s in samples], answer_length, 0).bool(),
    )


def sample(start, grids, end, answer):
    images = [token for image in placeholders(*grids) for token in image]
    return ([*start, *images, *end], None, grids, answer)


ONE = sample([10, 11], [(1, 4, 6)], [20, 21, 22], [20, 21])
TEXT = sample([12, 13, 14], [], [23, 24], [23])
TWO = sample([15], [(1, 2, 2), (1, 4, 4)], [25], [25, 26, 27])
FRAMES = sample([16], [(2, 2, 4)], [28, 29], [28])
SAMPLES = dict(one=ONE, text=TEXT, two=TWO, frames=FRAMES)


def losses(model, samples, **settings):
    output = model(make_batch(samples), **settings)
    return output.token_loss_sum, output.num_tokens


@pytest.mark.parametrize("position_ids", ["mrope", "1d"])
@pytest.mark.parametrize(
    "names",
    [["one"], ["text"], ["two"], ["one", "text", "two"], ["text", "one"], ["frames", "two", "text", "one"], ["text", "text"]],
)
def test_a_batch_is_the_sum_of_its_samples(names, position_ids, language_model):
    model = CoMP(make_encoder(), language_model, image_token_id=IMAGE, position_ids=position_ids)
    samples = [SAMPLES[name] for name in names]
    together, count = losses(model, samples)
    alone = [losses(model, [one]) for one in samples]
    assert count == sum(n for _, n in alone) == sum(len(s[0]) - s[0].count(IMAGE) - 1 for s in samples)
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-4)


def test_loss_equals_the_language_models_own(model):
    """Features put in by hand, positions 0, 1, 2, ..: the loss that transformers computes itself."""
    model = CoMP(model.encoder, model.language_model, image_token_id=IMAGE, position_ids="1d")
    batch = make_batch([ONE])
    embeds = model.language_model.get_input_embeddings()(batch.input_ids)
    visual = model.adapter(model.encoder(batch.pixel_values, batch.grid_thw))
    embeds = torch.cat((embeds[:, :3], visual.unsqueeze(0), embeds[:, 9:]), dim=1)
    output = model(batch)
    expected = model.language_model(inputs_embeds=embeds, labels=batch.labels).loss
    torch.testing.assert_close(output.token_loss_sum / output.num_tokens, expected, rtol=1e-5, atol=1e-5)


def test_text_only_is_the_plain_language_model(model):
    batch = make_batch([TEXT])
    output = model(batch)
    expected = model.language_model(input_ids=batch.input_ids, labels=batch.labels).loss
    torch.testing.assert_close(output.token_loss_sum / output.num_tokens, expected)


def test_mrope_makes_a_difference_for_images_only(language_model):
    encoder = make_encoder()
    results = {}
    for kind in ("1d", "mrope"):
        model = CoMP(encoder, language_model, image_token_id=IMAGE, position_ids=kind)
        results[kind] = [losses(model, [one])[0].item() for one in (ONE, TEXT)]
    assert results["1d"][1] == results["mrope"][1]
    assert abs(results["1d"][0] - results["mrope"][0]) > 1e-3


def test_alignment_loss_by_hand(model):
    """Mixed batch: features pooled as the paper says, text-only samples and samples without an answer do not count."""
    no_answer = (*ONE[:3], [])
    samples = [ONE, TEXT, TWO, no_answer, FRAMES]
    settings = AlignmentConfig(mode="literal", epsilon=0.05, temperature=0.1, prototype_source="lm_head")
    counts = torch.arange(60)
    model.set_word_counts(counts)
    output = model(make_batch(samples), alignment=settings)
    assert output.num_aligned == 3

    vision, text = [], []
    for one in (ONE, TWO, FRAMES):
        batch = make_batch([one])
        vision.append(model.adapter(model.encoder(batch.pixel_values, batch.grid_thw)).mean(0))
        text.append(model.language_model.base_model(input_ids=batch.answer_ids).last_hidden_state[0].mean(0))
    expected = comp_kernels.reference.alignment_loss(
        torch.stack(vision),
        torch.stack(text),
        model.language_model.lm_head.weight,
        prior=counts,
        mode="literal",
        epsilon=0.05,
        temperature=0.1,
    )
    torch.testing.assert_close(output.alignment_loss, expected, rtol=1e-5, atol=1e-5)


def test_alignment_trains_vision_and_adapter_only(model):
    output = model(make_batch([ONE, TEXT, TWO]), alignment=AlignmentConfig())
    output.alignment_loss.backward()
    parts = model.named_parts()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parts["adapter"].values())
    # SigLIP's key bias has no effect on a softmax: its gradient is rounding
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parts["vision"].values())
    assert all(p.grad is None for p in parts["language"].values())


@pytest.mark.parametrize("mode", ["sinkhorn", "literal", "released", "softmax", "contrastive"])
def test_alignment_is_finite_at_cosine_one(mode, model):
    """exp(1 / 0.005) overflows float32; here vision, text and a prototype are one direction."""
    direction = torch.randn(64)
    with torch.no_grad():
        model.language_model.get_input_embeddings().weight[8] = direction
    visual = direction.expand(4, 64).clone().requires_grad_()
    text = torch.stack((direction, direction, -direction, direction))
    grids = [[(1, 1, 1)]] * 4
    settings = AlignmentConfig(mode=mode)
    step_text = StepText(features=text, valid=torch.ones(4, dtype=torch.bool))
    loss = model.align(visual, grids, step_text, settings)
    loss.backward()
    assert loss.isfinite() and visual.grad.isfinite().all()


def test_a_graph_that_is_retained_gives_the_same_gradients_again(model):
    output = model(make_batch([ONE, TEXT, TWO]), alignment=AlignmentConfig())
    loss = output.token_loss_sum / output.num_tokens + output.alignment_loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    first, again = (torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for _ in range(2))
    for gradient, expected in zip(again, first):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_alignment_without_any_valid_sample_is_zero(model):
    output = model(make_batch([TEXT, TEXT]), alignment=AlignmentConfig())
    assert output.alignment_loss.item() == 0 and output.num_aligned == 0


def test_text_features_use_no_dropout_and_no_gradient():
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=60
    )
    config.attention_dropout = 0.5
    model = CoMP(make_encoder(), transformers.Qwen2ForCausalLM(config), image_token_id=IMAGE).train()
    ids, mask = torch.randint(8, 60, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    first, second = (model.text_features(ids, mask) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert all(module.training for module in model.modules()), "the mode comes back"


def test_what_starts_a_text_is_no_part_of_its_features(model):
    ids, mask = torch.randint(8, 60, (3, 6)), torch.tensor([[1] * 6, [0] * 6, [1] * 3 + [0] * 3]).bool()
    start = torch.tensor([1, 2])
    expected = torch.zeros(3, model.adapter.language_width)
    with torch.no_grad():
        for row in (0, 2):
            text = torch.cat((start, ids[row, mask[row]])).unsqueeze(0)
            expected[row] = model.language_model.model(input_ids=text).last_hidden_state[0, 2:].mean(0)
    model.text_start = start.tolist()
    torch.testing.assert_close(model.text_features(ids, mask), expected)
    assert model.text_features(ids, mask & False).eq(0).all()


def test_prototypes(model):
    lm = model.language_model
    assert torch.equal(model.prototypes("embed_tokens"), lm.get_input_embeddings().weight)
    assert torch.equal(model.prototypes("lm_head"), lm.lm_head.weight) and not model.prototypes("lm_head").requires_grad
    with pytest.raises(ValueError, match="freeze_prototypes first"):
        model.prototypes("frozen")
    model.freeze_prototypes("lm_head")
    before = lm.lm_head.weight.detach().clone()
    with torch.no_grad():
        lm.lm_head.weight.add_(1)
    assert torch.equal(model.prototypes("frozen"), before) and "frozen_prototypes" in model.state_dict()
    with pytest.raises(ValueError, match="prototype_source must be one of"):
        model.prototypes("words")


def test_every_parameter_is_in_one_part(model):
    parts = model.named_parts()
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(name.startswith("encoder.adapter.") for name in parts["adapter"]) and len(parts["adapter"]) == 6
    assert all("adapter" not in name for name in parts["vision"])


def test_dummy_image_touches_the_vision_parameters_and_changes_nothing(model):
    batch = make_batch([TEXT])
    plain = model(batch).token_loss_sum
    model.dummy_image = True
    output = model(batch, alignment=AlignmentConfig())
    assert torch.equal(output.token_loss_sum, plain)
    output.token_loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert name.startswith("language_model.") or parameter.grad.eq(0).all(), name


@pytest.mark.parametrize("samples", [[ONE, TEXT], [TEXT]], ids=["mixed", "text_only"])
def test_frozen_parts_still_train_the_rest(samples, model):
    """Stage I: the adapter alone trains; a batch without images then has a loss with gradient zero, not without one."""
    model.language_model.requires_grad_(False)
    model.encoder.requires_grad_(False)
    model.adapter.requires_grad_(True)
    model(make_batch(samples)).token_loss_sum.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(model.named_parts()["adapter"])
    assert any(p.grad.abs().max() > 0 for p in model.adapter.parameters()) == (ONE in samples)


def greedy(model, batch, steps):
    """Greedy decoding without any cache: the whole row again for every token."""
    answers = []
    for row in range(len(batch.input_ids)):
        ids = batch.input_ids[row][batch.attention_mask[row]]
        images = batch.image_sample == row
        sizes = batch.grid_thw.prod(1)
        patches = batch.pixel_values[torch.repeat_interleave(images, sizes)]
        grown = []
        for _ in range(steps):
            full = torch.cat((ids, torch.tensor(grown, dtype=torch.long))).unsqueeze(0)
            one = dataclasses.replace(
                batch,
                input_ids=full,
                attention_mask=torch.ones_like(full, dtype=torch.bool),
                labels=full,
                pixel_values=patches,
                grid_thw=batch.grid_thw[images],
                image_sample=torch.zeros(int(images.sum()), dtype=torch.long),
            )
            with torch.no_grad():
                hidden = model.decode(one, model.visual_tokens(one), model.token_grids(one))
            grown.append(int(model.language_model.lm_head(hidden[-1]).argmax()))
        answers.append(grown)
    return answers


@pytest.mark.parametrize("position_ids", ["mrope", "1d"])
def test_generate_equals_decoding_without_a_cache(position_ids, language_model):
    model = CoMP(make_encoder(), language_model, image_token_id=IMAGE, position_ids=position_ids)
    with torch.no_grad():
        language_model.lm_head.weight[IMAGE] = 0  # random weights may otherwise answer with the placeholder of an image
    batch = make_batch([ONE, TEXT, TWO, FRAMES])
    expected = greedy(model, batch, 8)
    assert model.generate(batch, max_new_tokens=8, eos_token_id=[]) == expected
    assert len({tuple(row) for row in expected}) == 4, "rows differ, or this would show nothing"

    stop = expected[0][3]
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert model.generate(batch, max_new_tokens=8, eos_token_id=stop) == cut
    assert model.generate(batch, max_new_tokens=1, eos_token_id=[]) == [row[:1] for row in expected]


def test_generate_stops_by_the_generation_config_and_restores_the_mode(model):
    batch = make_batch([ONE])
    first = model.generate(batch, max_new_tokens=1, eos_token_id=[])[0][0]
    model.language_model.generation_config.eos_token_id = first
    model.train()
    assert model.generate(batch, max_new_tokens=5) == [[]]
    assert model.training and model.encoder.blocks[0].training


def test_placeholder_errors_carry_the_counts(model):
    batch = make_batch([TEXT, ONE])
    broken = dataclasses.replace(batch, grid_thw=torch.tensor([[1, 4, 4]]), pixel_values=batch.pixel_values[:16])
    message = "input_ids row 1 has 6 placeholders (id 5) but its 1 images make 4 visual tokens: [(1, 2, 2)]"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(broken)
    moved = dataclasses.replace(batch, image_sample=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"row 0 has 0 placeholders \(id 5\) but its 1 images make 6 visual tokens"):
        model(moved)
    unsorted = dataclasses.replace(make_batch([ONE, ONE]), image_sample=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"image_sample must give each of the 2 images .* got \[1, 0\]"):
        model(unsorted)


def test_construction_errors(language_model):
    with pytest.raises(ValueError, match="image_token_id must be a row of the 60 word embeddings, got 60"):
        CoMP(make_encoder(), language_model, image_token_id=60)
    with pytest.raises(ValueError, match=r"position_ids must be one of .*, got '2d'"):
        CoMP(make_encoder(), language_model, image_token_id=IMAGE, position_ids="2d")
    encoder = make_encoder()
    encoder.adapter = Adapter(48, 32)
    with pytest.raises(ValueError, match="adapter makes tokens of width 32, the language model has 64"):
        CoMP(encoder, language_model, image_token_id=IMAGE)
    model = CoMP(make_encoder(), language_model, image_token_id=IMAGE)
    with pytest.raises(ValueError, match=r"counts must have one entry per word embedding, \(60,\), got \(59,\)"):
        model.set_word_counts(torch.ones(59))


def test_adapter_follows_its_specification():
    adapter = Adapter(8, 5)
    patches = torch.randn(12, 8)
    with torch.no_grad():
        adapter.norm.weight.normal_()
        normed = F.layer_norm(patches, (8,), adapter.norm.weight, adapter.norm.bias, eps=1e-6)
        merged = torch.stack([normed[4 * i : 4 * i + 4].flatten() for i in range(3)])
        expected = adapter.fc2(F.gelu(adapter.fc1(merged)))
        torch.testing.assert_close(adapter(patches), expected)


@pytest.mark.parametrize("init, std", [("lecun", (4 * 300) ** -0.5), ("truncated", 0.02 * 0.88)])
def test_adapter_initialisations(init, std):
    adapter = Adapter(300, 200, init=init)
    for linear in (adapter.fc1, adapter.fc2):
        assert abs(linear.weight.std() / std - 1) < 0.02 and linear.bias.eq(0).all()
    assert init == "lecun" or adapter.fc1.weight.abs().max() <= 0.04
    with pytest.raises(ValueError, match="init must be one of"):
        Adapter(8, 5, init="xavier")


@pytest.mark.parametrize("position_ids", ["mrope", "1d"])
def test_save_and_load(position_ids, language_model, tmp_path):
    model = CoMP(make_encoder(), language_model, image_token_id=IMAGE, position_ids=position_ids)
    model.save_pretrained(tmp_path)
    loaded = CoMP.from_pretrained(tmp_path)
    batch = make_batch([ONE, TEXT, TWO])
    assert torch.equal(loaded(batch).token_loss_sum, model(batch).token_loss_sum)
    assert loaded.encoder.pos_mode == "abs+rope" and not loaded.training
    assert CoMP.from_pretrained(tmp_path, dtype=torch.bfloat16).adapter.fc2.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"folder must hold config\.json, vision/ and language/"):
        CoMP.from_pretrained(tmp_path / "vision")
    tower = VisionEncoder.from_pretrained(tmp_path)  # of the whole
    assert torch.equal(tower.pos_embed, model.encoder.pos_embed)
    (tmp_path / "config.json").unlink()  # as it was before transformers could read it
    (tmp_path / "comp.json").write_text(json.dumps(dict(image_token_id=IMAGE, position_ids=position_ids)))
    assert torch.equal(CoMP.from_pretrained(tmp_path)(batch).token_loss_sum, model(batch).token_loss_sum)
