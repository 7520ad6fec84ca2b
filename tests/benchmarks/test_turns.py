"""The programs that compare builds of the CPU library: whose functions run, what a rounding error is, what a budget."""

import os
import random

import pytest
import torch

import comp_kernels as ck
from benchmarks.precision import beyond_budget, random_case, rms
from benchmarks.turns import Build, rounds_in_turns
from comp_kernels import _native, testing
from comp_kernels.testing import AttentionCase


@pytest.fixture
def baseline(tmp_path):
    if _native.cpu_unavailable_reason() is not None:
        pytest.skip(_native.cpu_unavailable_reason())
    return Build("now:baseline", tmp_path)


def test_a_build_serves_where_it_is_in_place(baseline, tmp_path):
    other = Build("now", tmp_path)
    assert baseline.instruction_set.startswith("baseline")
    assert other.instruction_set == _native.cpu().comp_kernels_cpu_isa().decode()
    installed = _native.cpu_function("rope_attention_forward")
    before = os.environ.get("COMP_KERNELS_CPU_ISA")
    with baseline.in_place():
        assert _native.cpu_function("rope_attention_forward") is baseline.function("rope_attention_forward")
        assert os.environ["COMP_KERNELS_CPU_ISA"] == "baseline"
    assert _native.cpu_function("rope_attention_forward") is installed
    assert os.environ.get("COMP_KERNELS_CPU_ISA") == before


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("now:nonsense", "must be one of baseline, avx2"),
        ("nowhere.so", "there is no file nowhere.so"),
        (f"{__file__}:baseline", "no library that loads here"),
    ],
)
def test_builds_that_are_none(what, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Build(what, tmp_path)


def test_a_set_that_the_processor_lacks_is_refused(tmp_path, baseline, monkeypatch):
    monkeypatch.setattr(_native, "INSTRUCTION_SETS", (*_native.INSTRUCTION_SETS, "avx1024"))
    with pytest.raises(ValueError, match="this processor has no avx1024"):
        Build("now:avx1024", tmp_path)


def test_every_build_is_called_in_every_round(baseline, tmp_path):
    builds, served = [baseline, Build("now", tmp_path)], []
    q = torch.randn(5, 1, 8)

    def call():
        served.append([b.name for b in builds if _native.cpu_function == b.function])
        return ck.rope_attention(q, q, q)

    times = rounds_in_turns(builds, call, rounds=3)
    assert [len(t) for t in times] == [3, 3] and min(map(min, times)) > 0
    assert sorted(served) == sorted([[b.name] for b in builds] * 8)  # twice to begin with, twice in each round


def test_rms_of_scores():
    q, k = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    exact = (q.double() * k.double()).sum(1)
    assert rms(exact, q, k) == 0
    assert rms(exact + torch.tensor([5.0, -2.0]).double() * 2.0**-24, q, k) == pytest.approx(1.0)  # |q| |k| of each


def test_what_is_beyond_its_budget_is_told(baseline, monkeypatch):
    case = AttentionCase("example", [9, 3], head_dim=16)
    assert beyond_budget(case, torch.float32) is None

    def off_by_a_thousandth(*args, **kwargs):
        out, lse = ck.rope_attention(*args, **kwargs)
        return out * 1.001, lse

    monkeypatch.setattr(testing, "rope_attention", off_by_a_thousandth)
    assert "example out" in beyond_budget(case, torch.float32)


def test_random_cases_follow_the_seed():
    drawn = [[random_case(rng) for _ in range(20)] for rng in (random.Random(1), random.Random(1), random.Random(2))]
    assert drawn[0] == drawn[1] != drawn[2]
