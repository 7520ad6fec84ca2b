"""Packed rows filled up to a few sizes in bfloat16 on a CPU: what is behind the last token changes nothing."""

import pytest
import torch
from language_models import make_language_model
from test_language_models import IMAGE, TOWER, batch, text, with_image
from torch import nn
from transformers.pytorch_utils import Conv1D

from comp.config import AlignmentConfig
from comp.model import CoMP, VisionEncoder, losses, multimodal, packed_rows, row_sizes, vision_encoder
from comp.model.vit_config import ViTConfig

USERS = (losses, multimodal, packed_rows, row_sizes, vision_encoder)
"""Modules that put slack behind tokens."""
FAMILIES = ["Llama", "Mistral, window 16", "GPT2", "Mixtral", "Gemma3, logits capped, window 16", "Mamba"]
"""Last layers that are shortened and others, windows, experts, a head that is not linear alone, rows that are padded."""


def make_model(family, prefix_tokens=0):
    torch.manual_seed(1)
    encoder = VisionEncoder(ViTConfig(**TOWER, num_prefix_tokens=prefix_tokens, keep_prefix_tokens=prefix_tokens > 0))
    return CoMP(encoder, make_language_model(family), image_token_id=IMAGE, position_ids="1d").eval()


def make_batch():
    """86 tokens of which a part is learned, 72 patches; a sample is aligned."""
    samples = [text(3, 1), with_image(40, 2), text(1, 3), with_image(22, 4), with_image(2, 5)]
    samples[1].answer_ids = list(range(3, 9))
    data = batch(samples)
    data.labels[1, :20] = -100
    return data


def computed(model, data, *, bf16=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(data, alignment=AlignmentConfig(temperature=0.5))


def results(model, data, *, bf16=True):
    """Losses and gradients of a batch."""
    output = computed(model, data, bf16=bf16)
    model.zero_grad()
    (output.token_loss_sum + output.alignment_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(token=output.token_loss_sum.detach(), alignment=output.alignment_loss.detach(), **gradients)


def test_sizes_are_few_and_near():
    sizes = [row_sizes.filled_up(n) for n in range(5000)]
    for n, size in enumerate(sizes):
        assert n <= size < n + max(16, n / 16) and row_sizes.filled_up(size) == size
    assert sizes[0] == 0 and sizes == sorted(sizes)
    assert len(set(sizes[513:1025])) == len(set(sizes[2049:4097])) == 16


def test_only_bfloat16_under_autocast_on_a_cpu_is_filled_up():
    assert row_sizes.slack_rows(17, torch.device("cpu")) == 0
    for dtype, device, slack in ((torch.bfloat16, "cpu", 15), (torch.float16, "cpu", 0), (torch.bfloat16, "cuda", 0)):
        with torch.autocast("cpu", dtype):
            assert row_sizes.slack_rows(17, torch.device(device)) == slack
    x = torch.ones(1, 2, 3)
    assert row_sizes.with_slack(x, 0) is x
    assert row_sizes.with_slack(x, 4, dim=1).sum(2).tolist() == [[3, 3, 0, 0, 0, 0]]


@pytest.mark.parametrize(("family", "prefix_tokens"), [*((family, 0) for family in FAMILIES), ("Llama", 2)])
def test_losses_and_gradients_are_those_without_slack(family, prefix_tokens, monkeypatch):
    """But for the order of sums: they differ by less than half of what bfloat16 itself makes of them."""
    model, data = make_model(family, prefix_tokens), make_batch()
    filled = results(model, data)
    monkeypatch.setattr(row_sizes, "filled_up", lambda n: n)
    plain, exact = results(model, data), results(model, data, bf16=False)
    assert filled.keys() == plain.keys()
    for name, value in filled.items():
        rounding = torch.linalg.vector_norm(plain[name] - exact[name]) + 1e-6
        assert torch.linalg.vector_norm(value - plain[name]) <= 0.5 * rounding, name


@pytest.mark.parametrize("family", ["Llama", "Mistral, window 16", "GPT2"])
def test_what_is_in_the_slack_is_not_read(family, monkeypatch):
    """With NaN in its place the losses are the same bits, with random numbers the gradients, too."""
    model, data = make_model(family, prefix_tokens=2), make_batch()
    expected = results(model, data)
    count, fill_up = [], row_sizes.with_slack

    def filled_with(make):
        def with_slack(x, slack, dim=0):
            out = fill_up(x, slack, dim)
            if slack and x.is_floating_point() and x.dim() > 1:
                rest = out.narrow(dim, x.shape[dim], slack)
                out = torch.cat((out.narrow(dim, 0, x.shape[dim]), make(rest).detach()), dim)
                count.append(slack)
            return out

        return with_slack

    for user in USERS:
        monkeypatch.setattr(user, "with_slack", filled_with(torch.randn_like))
    assert all(torch.equal(value, expected[name]) for name, value in results(model, data).items())
    assert len(count) >= 7
    for user in set(USERS) - {losses}:  # which multiplies by shares of zero
        monkeypatch.setattr(user, "with_slack", filled_with(lambda x: torch.full_like(x, torch.nan)))
    output = computed(model, data)
    assert torch.equal(output.token_loss_sum, expected["token"]) and torch.equal(output.alignment_loss, expected["alignment"])


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_every_layer_computes_one_of_the_sizes(family):
    model, seen = make_model(family, prefix_tokens=2), set()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(lambda module, arguments: seen.add(arguments[0][..., 0].numel()))
    results(model, make_batch())
    assert len(seen) > 3 and all(row_sizes.filled_up(rows) == rows for rows in seen), seen


def test_features_and_layers_of_the_tower_have_no_slack():
    encoder, data = make_model("Llama", prefix_tokens=2).encoder, make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        features, layers = encoder(data.pixel_values, data.grid_thw, return_layers=[0])
        assert len(features) == len(layers[0]) == len(data.pixel_values) == 72
        assert len(encoder.adapter(features)) == 18


def test_nothing_to_learn_and_no_image():
    model, data = make_model("Llama"), batch([text(3, 1), text(5, 2)])
    data.labels[:] = -100
    loss = computed(model, data).token_loss_sum
    assert loss == 0
    loss.backward()
