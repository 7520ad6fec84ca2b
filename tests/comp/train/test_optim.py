"""Optimiser: the partition of parameters, learning rates, schedule."""

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from comp.config import OptimConfig
from comp.train.optim import build_optimizer, check_partition, lr_multiplier, part_reports, set_learning_rates, set_trainable

RATES = OptimConfig(lr_vision=1e-4, lr_adapter=5e-3, lr_language=2e-5, weight_decay=0.1)


class ThreeParts(nn.Module):
    def __init__(self, lost: str = ""):
        super().__init__()
        self.vision = nn.ModuleDict({"fc": nn.Linear(3, 3), "norm": nn.LayerNorm(3)})
        self.vision.pos_embed = nn.Parameter(torch.zeros(2, 3))
        self.adapter = nn.Linear(3, 3)
        self.language = nn.Embedding(5, 3)
        self.lost = lost

    def named_parts(self):
        parts = {part: {} for part in ("vision", "adapter", "language")}
        for name, parameter in self.named_parameters():
            if name != self.lost:
                parts[name.split(".")[0]][name] = parameter
        return parts


def test_each_trainable_parameter_is_in_one_group_with_its_rate():
    model = ThreeParts()
    optimizer = build_optimizer(model, RATES)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rate[id(parameter)] == RATES.lr(name.split(".")[0]), name
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"vision.fc.weight", "adapter.weight", "language.weight"}, "no biases, norms, position tables"


@pytest.mark.parametrize("lost", ["adapter.weight", "vision.norm.bias"])
def test_a_parameter_left_out_is_an_error(lost):
    with pytest.raises(ValueError, match=f"parameter {lost} must be in 1 optimiser group.s., found in 0"):
        build_optimizer(ThreeParts(lost=lost), RATES)


def test_a_parameter_in_two_groups_a_frozen_or_a_foreign_one_is_an_error():
    model = ThreeParts()
    groups = build_optimizer(model, RATES).param_groups
    with pytest.raises(ValueError, match="found in 2"):
        check_partition(model, [*groups, groups[0]])
    model.adapter.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"adapter\.weight must be in 0 optimiser"):
        check_partition(model, groups)
    model.adapter.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="not the model's"):
        check_partition(model, [*groups, dict(params=[nn.Parameter(torch.zeros(1))], peak_lr=1.0)])


def test_a_part_without_a_rate_is_an_error():
    with pytest.raises(ValueError, match="part adapter trains with learning rate 0"):
        build_optimizer(ThreeParts(), OptimConfig(lr_vision=1e-4, lr_language=1e-4))


def test_frozen_parts_are_left_out():
    model = ThreeParts()
    set_trainable(model, ["adapter"])
    optimizer = build_optimizer(model, OptimConfig(lr_adapter=1e-3))
    assert {g["part"] for g in optimizer.param_groups} == {"adapter"}
    reports = {r.part: r for r in part_reports(model, OptimConfig(lr_adapter=1e-3))}
    assert reports["adapter"].num_trainable == reports["adapter"].num_parameters == 12
    assert reports["vision"].num_trainable == 0 and reports["vision"].num_parameters == 24


def test_schedule_by_hand():
    config = OptimConfig(warmup_ratio=0.2, min_lr_ratio=0.1)
    values = [lr_multiplier(step, 10, config) for step in range(10)]
    assert values[:3] == [0.5, 1.0, 1.0], "two steps of warm-up, then the peak"
    assert math.isclose(values[6], 0.1 + 0.9 * 0.5), "half way down the cosine"
    assert values == sorted(values[:2]) + sorted(values[2:], reverse=True) and values[-1] > 0.1
    assert lr_multiplier(0, 1, OptimConfig(warmup_ratio=0.0)) == 1.0


def test_rates_are_set_per_part():
    optimizer = build_optimizer(ThreeParts(), RATES)
    assert set_learning_rates(optimizer, 0.5) == {"vision": 5e-5, "adapter": 2.5e-3, "language": 1e-5}
    assert {g["lr"] / g["peak_lr"] for g in optimizer.param_groups} == {0.5}


class LearnedTokens(nn.Module):
    """Parameters that are put into a sequence, in shapes and under names of all kinds, and matrices of all kinds."""

    def __init__(self):
        super().__init__()
        self.vision = nn.Module()
        for name, shape in {
            "prefix_tokens": (5, 4), "cls_token": (1, 1, 4), "register_tokens": (1, 4, 4), "mask_token": (1, 4),
            "latents": (8, 4), "probe": (1, 1, 4), "resampler_query": (2, 8, 4), "A_log": (4, 2), "scores_bias": (2, 4),
        }.items():  # fmt: skip
            setattr(self.vision, name, nn.Parameter(torch.zeros(shape)))
        self.vision.queries, self.vision.pos_embed = nn.Embedding(8, 4), nn.Embedding(8, 4)
        self.vision.conv = nn.Conv2d(3, 4, 2)
        self.adapter = nn.Module()
        self.adapter.attention = nn.MultiheadAttention(4, 2)
        self.language_model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_embd=4, n_layer=1, n_head=2, n_positions=9))
        self.language_model.experts = nn.Module()
        self.language_model.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4))
        self.language_model.experts.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 4))

    def named_parts(self):
        names = dict(vision="vision", adapter="adapter", language="language_model")
        parameters = list(self.named_parameters())
        return {part: {n: p for n, p in parameters if n.split(".")[0] == root} for part, root in names.items()}


def test_weight_decay_leaves_learned_tokens_alone():
    model = LearnedTokens()
    decayed = {id(p) for g in build_optimizer(model, RATES).param_groups if g["weight_decay"] for p in g["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {
        "vision.conv.weight",
        "adapter.attention.in_proj_weight",
        "adapter.attention.out_proj.weight",
        "language_model.transformer.wte.weight",
        "language_model.transformer.h.0.attn.c_attn.weight",
        "language_model.transformer.h.0.attn.c_proj.weight",
        "language_model.transformer.h.0.mlp.c_fc.weight",
        "language_model.transformer.h.0.mlp.c_proj.weight",
        "language_model.experts.gate_up_proj",
    }
