"""Options that follow the paper or its released code where the default does not: what each one changes, and that nothing else
does."""

import dataclasses
import json
from unittest.mock import patch

import pytest
import torch
from toy import ColouredRectangles, toy_config

from comp.build import build_model, sample_encoder, set_position_mode
from comp.config import AlignmentConfig, ConfigError, OptimConfig
from comp.config_io import apply_overrides
from comp.data.batch import Message, Sample
from comp.data.loader import StepDataset
from comp.data.mixture import open_sources
from comp.data.packing import collate
from comp.model.losses import Head, Learned, chunked_alignment_loss, next_token_loss
from comp.parallel import World
from comp.train.optim import build_optimizer, lr_multiplier, set_trainable
from comp.train.step import StepTotals, accumulate_gradients, train_step
from comp.train.trainer import Trainer
from comp_kernels import alignment_loss

pytestmark = pytest.mark.slow

ALONE = World(rank=0, size=1, device=torch.device("cpu"), group=None)
SETTINGS = dict(mode="sinkhorn", epsilon=0.1, temperature=0.1, num_iters=3, prior_temperature=0.05)


def rows(n: int = 10, words: int = 30, width: int = 12):
    generator = torch.Generator().manual_seed(0)
    vision, text = (torch.randn(n, width, generator=generator) for _ in range(2))
    return vision.requires_grad_(), text, torch.randn(words, width, generator=generator), torch.arange(n) % 4 != 3


# --- target batch -------------------------------------------------------------------------------------------------------------


def test_targets_of_chunks_are_those_of_batches_of_their_own():
    vision, text, words, valid = rows()
    prior = torch.arange(30)
    loss = chunked_alignment_loss(vision, text, words, chunk=4, valid=valid, prior=prior, **SETTINGS)
    expected = sum(
        valid[part].sum() * alignment_loss(vision[part], text[part], words, valid=valid[part], prior=prior, **SETTINGS)
        for part in (slice(0, 4), slice(4, 8), slice(8, 10))
    )
    torch.testing.assert_close(loss, expected / valid.sum())
    whole = alignment_loss(vision, text, words, valid=valid, prior=prior, **SETTINGS)
    assert not torch.allclose(loss, whole, rtol=1e-3), "sinkhorn couples the rows of a batch"
    everything = chunked_alignment_loss(vision, text, words, chunk=10, valid=valid, prior=prior, **SETTINGS)
    torch.testing.assert_close(everything, whole)
    gradient = torch.autograd.grad(loss, vision)[0]
    assert gradient[~valid].eq(0).all() and gradient[valid].abs().sum(1).gt(0).all()


def step_of(folder, *overrides, stage=2):
    """(model, loss and alignment loss, gradients) of the first step of a stage of the toy run."""
    config = apply_overrides(toy_config(folder), overrides)
    torch.manual_seed(0)
    model, template = build_model(config)
    settings = config.stages[stage]
    set_trainable(model, settings.trainable)
    set_position_mode(model, config, settings)
    dataset = StepDataset(
        open_sources(settings.data, 0),
        sample_encoder(model, template, config, settings),
        batch_size=8,
        epochs=1,
        seed=0,
        visual_tokens=settings.forward_visual_tokens,
        text_tokens=settings.forward_text_tokens,
    )
    data = dataset[0]
    totals = StepTotals.gather(data, ALONE, stop=False)
    token, aligned = accumulate_gradients(model, data, totals, settings, ALONE, pad_id=template.pad_id, bf16=False)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return model, (token.item(), None if aligned is None else aligned.item()), gradients, len(data.batches)


SMALL = ("stages.2.forward_visual_tokens=64", "stages.2.forward_text_tokens=256")


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.2.alignment.target_batch=3"],
        ["stages.2.token_loss=sample"],
        ["stages.2.alignment.prototype_source=learned"],
        ["stages.2.alignment.prototype_source=learned", "stages.2.alignment.target_batch=2"],
        ["stages.2.alignment.prior=false"],
    ],
)
def test_the_cut_into_passes_changes_no_option(toy_models, overrides):
    """Rows of other passes cost a constant: loss and gradients of the step are those of one pass."""
    _, whole, expected, _ = step_of(toy_models, "stages.2.max_visual_tokens=60", *overrides)
    order = ("stages.2.max_visual_tokens=60", "stages.2.max_text_tokens=256", *SMALL)
    _, cut, gradients, passes = step_of(toy_models, *order, *overrides)
    assert passes > 1
    if not any("target_batch" in o for o in overrides):  # packing sorts, and chunks are taken in the order of packing
        assert cut == pytest.approx(whole, rel=1e-4)
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, rtol=2e-3, atol=1e-5, msg=name)
    assert all(value.isfinite().all() for value in gradients.values())


def test_target_batch_is_for_targets_that_depend_on_each_other():
    with pytest.raises(ConfigError, match=r'alignment\.target_batch is for mode "sinkhorn"'):
        AlignmentConfig(mode="softmax", target_batch=32)
    with pytest.raises(ConfigError, match=r"alignment\.target_batch must be positive or null, got 0"):
        AlignmentConfig(target_batch=0)


# --- prior and prototypes -----------------------------------------------------------------------------------------------------


def test_without_prior_all_words_count_alike(toy_models):
    def loss(prior: bool, counts: torch.Tensor) -> float:
        torch.manual_seed(0)
        config = apply_overrides(toy_config(toy_models), [f"stages.2.alignment.prior={prior}"])
        model, template = build_model(config)
        model.set_word_counts(counts(len(template.tokenizer)))
        encoder = sample_encoder(model, template, config, config.stages[2])
        samples = [encoder.encode(ColouredRectangles(8)[i]) for i in range(4)]
        batch = collate(samples, pad_id=template.pad_id, patch_features=encoder.patch_features)
        return model(batch, alignment=config.stages[2].alignment).alignment_loss.item()

    def skewed(n):
        return torch.arange(n) ** 3

    assert loss(False, skewed) == loss(False, torch.ones) == pytest.approx(loss(True, torch.ones), rel=1e-5)
    assert loss(True, skewed) != loss(False, skewed)


@pytest.mark.parametrize("mode", ["sinkhorn", "literal", "released", "softmax"])
def test_learned_prototypes_are_the_same_loss_with_a_gradient_more(mode):
    vision, text, words, valid = rows()
    settings = SETTINGS | dict(mode=mode, prior=torch.arange(30), valid=valid)
    words.requires_grad_()
    loss = alignment_loss(vision, text, words, prototype_gradient=True, **settings)
    fixed = alignment_loss(vision, text, words, **settings)
    torch.testing.assert_close(loss, fixed, rtol=1e-5, atol=1e-6)
    ours, moved = torch.autograd.grad(loss, (vision, words))
    torch.testing.assert_close(ours, torch.autograd.grad(fixed, vision)[0], rtol=1e-4, atol=1e-6)
    assert moved.abs().sum() > 0
    # against numbers: the target is fixed, the prediction is a function of the prototypes
    with torch.no_grad():
        unit = torch.nn.functional.normalize(words, dim=1)
        scores = torch.nn.functional.normalize(torch.where(valid[:, None], text, 0.0), dim=1) @ unit.T
        options = {k: v for k, v in settings.items() if k not in ("temperature", "prior")}
        from comp_kernels.ops.alignment_loss.reference import target_distribution

        target = target_distribution(scores, settings["prior"], group=None, **options)

    def predicted(prototypes):
        cosines = (
            torch.nn.functional.normalize(vision.detach().double(), dim=1) @ torch.nn.functional.normalize(prototypes, dim=1).T
        )
        per_row = -(target.double() * (cosines / 0.1).log_softmax(-1)).sum(-1)
        return per_row[valid].sum() / valid.sum()

    by_autograd = torch.autograd.functional.jacobian(predicted, words.detach().double())
    torch.testing.assert_close(moved.double(), by_autograd, rtol=1e-3, atol=1e-6)


def test_learned_prototypes_train_with_the_adapter_and_survive_a_checkpoint(toy_folder):
    overrides = ["stages.*.alignment.prototype_source=learned", "stages.3.alignment=null", "name=learned"]
    overrides = [o.replace("stages.*", f"stages.{i}") for o in overrides[:1] for i in range(3)] + overrides[1:]
    config = apply_overrides(toy_config(toy_folder), overrides)
    with patch("comp.train.trainer.plot_run"):
        trainer = Trainer(config)
        before = trainer.model.learned_prototypes.detach().clone()
        trainer.run()
        after = trainer.model.learned_prototypes.detach()
        assert not torch.equal(after, before)
        resumed = Trainer(config, resume=True)
        resumed.run()
    assert torch.equal(resumed.model.learned_prototypes, after)
    parts = trainer.model.named_parts()
    assert "learned_prototypes" in parts["adapter"] and "learned_prototypes" not in parts["vision"]


# --- text of the alignment loss -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_of(toy_models):
    config = toy_config(toy_models)
    model, template = build_model(config)

    def make(**settings):
        stage = dataclasses.replace(config.stages[2], alignment=AlignmentConfig(**settings))
        return sample_encoder(model, template, config, stage)

    return make


def three_answers() -> Sample:
    turns = [Message(role=role, text=text) for text in ("red", "green", "blue") for role in ("user", "assistant")]
    return Sample(name="s", messages=turns)


def test_answers_are_shuffled_by_seed_and_place_alone(encoder_of):
    plain, shuffled = encoder_of(), encoder_of(shuffle_answers=True)
    decode = plain.template.decode
    assert {decode(plain.encode(three_answers(), seed=(0, i)).answer_ids) for i in range(20)} == {"red green blue"}
    found = [decode(shuffled.encode(three_answers(), seed=(0, i)).answer_ids) for i in range(60)]
    assert len(set(found)) == 6 and all(sorted(text.split()) == ["blue", "green", "red"] for text in found)
    assert found == [decode(shuffled.encode(three_answers(), seed=(0, i)).answer_ids) for i in range(60)]
    learned = [shuffled.encode(three_answers(), seed=(0, i)).input_ids for i in range(5)]
    assert all(ids == learned[0] for ids in learned), "what is learned token by token keeps its order"


def test_every_epoch_shuffles_anew(encoder_of):
    class One:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return three_answers()

    dataset = StepDataset(One(), encoder_of(shuffle_answers=True), batch_size=1, epochs=12, seed=3)
    texts = [dataset[step].batches[0].answer_ids.tolist() for step in range(12)]
    assert len({str(text) for text in texts}) > 1
    assert texts == [dataset[step].batches[0].answer_ids.tolist() for step in range(12)]


def test_a_text_of_its_own_is_not_shuffled_and_can_be_cut(encoder_of):
    sample = three_answers()
    sample.text = "red red green blue"
    whole = encoder_of(shuffle_answers=True).encode(sample, seed=(0, 1)).answer_ids
    assert encoder_of().template.decode(whole) == sample.text
    cut = encoder_of(max_text_tokens=3)
    assert cut.encode(sample).answer_ids == whole[:3] and len(whole) > 3
    assert cut.encode(sample).labels == encoder_of().encode(sample).labels


# --- next-token loss and warm-up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits_at_once", [1, 22, 10**6])
def test_a_loss_per_sample_by_hand(logits_at_once):
    hidden, labels = torch.randn(3, 7, 8, requires_grad=True), torch.randint(0, 11, (3, 7))
    labels[0, :4] = labels[1, 6:] = labels[2] = -100
    lm_head = torch.nn.Linear(8, 11)
    learned = Learned.of(labels, torch.ones_like(labels, dtype=torch.bool), per_sample=True)
    loss = next_token_loss(hidden.flatten(0, 1)[learned.predictors], learned, Head(lm_head, 11), logits_at_once)
    means = [torch.nn.functional.cross_entropy(lm_head(hidden[i, :-1]), labels[i, 1:], ignore_index=-100) for i in range(2)]
    torch.testing.assert_close(loss, sum(means))
    assert len(learned.targets) == 3 + 5
    for a, b in zip(torch.autograd.grad(loss, hidden), torch.autograd.grad(sum(means), hidden)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_step_divides_by_samples(toy_models):
    _, (by_sample, _), _, _ = step_of(toy_models, "stages.2.token_loss=sample")
    _, (by_token, _), _, _ = step_of(toy_models)
    assert by_sample == pytest.approx(by_token, rel=0.2) and by_sample != by_token


def test_warm_up_from_zero_is_hugging_faces():
    from transformers import get_cosine_schedule_with_warmup

    config = OptimConfig(warmup_ratio=0.2, warmup_from_zero=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=20)
    for step in range(20):
        assert lr_multiplier(step, 20, config) == pytest.approx(theirs.get_last_lr()[0]), step
        optimizer.step()
        theirs.step()
    assert lr_multiplier(0, 20, config) == 0.0 < lr_multiplier(0, 20, OptimConfig(warmup_ratio=0.2))


def test_a_step_of_rate_zero_moves_nothing(toy_models):
    config = toy_config(toy_models)
    model, template = build_model(config)
    stage = config.stages[0]
    set_trainable(model, stage.trainable)
    optimizer = build_optimizer(model, stage.optim)
    dataset = StepDataset(
        open_sources(stage.data, 0), sample_encoder(model, template, config, stage), batch_size=4, epochs=1, seed=0
    )
    before = model.adapter.fc1.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    totals = StepTotals.gather(dataset[0], ALONE, stop=False)
    train_step(model, optimizer, dataset[0], totals, stage, ALONE, pad_id=template.pad_id, bf16=False)
    assert torch.equal(model.adapter.fc1.weight, before)


# --- choices of the tower -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("vision.align_corners=true", "align_corners", True),
        ("vision.antialias=true", "antialias", True),
        ("vision.rope_dtype=bf16_legacy", "rope_dtype", "bf16_legacy"),
        ("vision.keep_prefix_tokens=true", "keep_prefix_tokens", True),
    ],
)
def test_choices_of_the_tower_come_from_the_command_line(toy_folder, override, field, value):
    (toy_folder / "vision").unlink()
    save_dinov2(toy_folder / "vision")
    config = apply_overrides(toy_config(toy_folder), [override])
    model, _ = build_model(config)
    assert getattr(model.encoder.config, field) == value
    plain, _ = build_model(toy_config(toy_folder))
    assert getattr(plain.encoder.config, field) != value
    patches, grid = torch.randn(300, 48), torch.tensor([[1, 10, 30]])
    for encoder in (model.encoder, plain.encoder):
        encoder.pos_mode = "abs+rope"
    assert not torch.equal(model.encoder(patches, grid), plain.encoder(patches, grid))
    # and a run keeps the choice in what it exports
    with patch("comp.train.trainer.plot_run"):
        Trainer(apply_overrides(config, ["stages.*.max_steps=1", "eval.data=[]", "name=choice"])).run()
    exported = json.loads((toy_folder / "runs" / "choice" / "models" / "III" / "vision" / "config.json").read_text())
    assert exported[field] == value


def test_table_2_pads_and_gives_as_many_tokens_as_the_paper(toy_models):
    from comp.recipes import FROZEN_TOWERS, RECIPES

    for name, (_, side, merge, rope) in FROZEN_TOWERS.items():
        config = RECIPES[name]()
        (stage,) = config.stages
        assert stage.trainable == ("adapter", "language") and stage.pad_to_square and stage.rope == rope, name
        patch = 16 if "patch16" in config.vision.path else 14
        tokens = (side // (patch * merge)) ** 2
        assert tokens == (729 if name == "table2_siglip-so400m" else 576), name
        assert side % (patch * merge) == 0 and tokens <= stage.max_visual_tokens


def test_padding_to_squares_keeps_the_shape_of_what_is_seen():
    from PIL import Image

    from comp.data.images import pad_to_square

    padded = pad_to_square(Image.new("RGB", (30, 10), "red"), (0.5, 0.25, 1.0))
    assert padded.size == (30, 30)
    assert padded.getpixel((0, 9)) == padded.getpixel((29, 20)) == (128, 64, 255)
    assert padded.getpixel((0, 10)) == padded.getpixel((29, 19)) == (255, 0, 0)
    long = pad_to_square(Image.new("RGB", (64_000, 3), "red"), (0.5, 0.25, 1.0))  # not a square of 12 GB
    assert long.size == (8000, 8000) and long.getpixel((4000, 3999)) == (255, 0, 0) and long.getpixel((0, 0)) == (128, 64, 255)
    with pytest.raises(ConfigError, match="stage II-b: pad_to_square needs a resolution"):
        apply_overrides(toy_config_without_files(), ["stages.2.pad_to_square=true"])


def test_a_stage_that_pads_sees_other_pixels_than_one_that_stretches(toy_models):
    def pixels(*overrides):
        config = apply_overrides(toy_config(toy_models), ["stages.1.max_visual_tokens=64", *overrides])
        model, template = build_model(config)
        wide = next(s for s in (ColouredRectangles(24)[i] for i in range(24)) if len(s.messages[0].images) == 1)
        wide.messages[0].images = [lambda: wide_picture()]
        return sample_encoder(model, template, config, config.stages[1]).encode(wide)

    stretched, padded = pixels(), pixels("stages.1.pad_to_square=true")
    assert stretched.grids == padded.grids and not torch.equal(stretched.patches[0], padded.patches[0])
    assert stretched.patches[0].std() == 0, "one colour"
    assert len(pixels("stages.1.pad_to_square=true", "vision.merge_size=1").input_ids) > len(padded.input_ids)


def wide_picture():
    from PIL import Image

    return Image.new("RGB", (48, 12), "white")


def save_dinov2(folder):
    """A tower with a CLS token, whose table is resampled for every grid but its own."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    model = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=4)
    )
    with torch.no_grad():
        model.embeddings.position_embeddings.normal_()
        model.embeddings.cls_token.normal_()
    model.save_pretrained(folder)


def test_wrong_choices_are_named():
    with pytest.raises(ConfigError, match=r"vision\.rope_dtype must be one of None, 'fp32', 'bf16_legacy', got 'fp16'"):
        apply_overrides(toy_config_without_files(), ["vision.rope_dtype=fp16"])
    with pytest.raises(ConfigError, match="stage I: token_loss must be one of 'token', 'sample', got 'word'"):
        apply_overrides(toy_config_without_files(), ["stages.0.token_loss=word"])


def toy_config_without_files():
    from pathlib import Path

    return toy_config(Path("/nowhere"))
