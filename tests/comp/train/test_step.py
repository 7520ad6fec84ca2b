"""Counts of a step over all processes, and what a loss that is not finite says."""

import math
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from comp.data.batch import IGNORED
from comp.data.loader import Skipped, StepData
from comp.data.packing import EncodedSample, collate
from comp.parallel import World
from comp.train.step import NonFiniteLossError, StepLosses, StepTotals, _check_finite, seed_step

ALONE = World(rank=0, size=1, device=torch.device("cpu"), group=None)


def sample(name, text, learned, images=0, answer=1):
    return EncodedSample(
        name=name,
        input_ids=[7] * text,
        labels=[IGNORED] * (text - learned) + [7] * learned,
        answer_ids=[7] * answer,
        patches=[torch.zeros(4, 48)] * images,
        grids=[(1, 2, 2)] * images,
        num_visual_tokens=images,
    )


def step_data(*samples, skipped=()):
    return StepData(
        step=0,
        batches=[collate([s], pad_id=0, patch_features=48) for s in samples],
        num_samples=len(samples),
        num_images=sum(len(s.grids) for s in samples),
        num_text_tokens=sum(len(s.input_ids) for s in samples),
        num_visual_tokens=sum(s.num_visual_tokens for s in samples),
        skipped=[Skipped(place, f"{place} is bad") for place in skipped],
        notes=[],
    )


FIRST = step_data(sample("a", 9, learned=4, images=1), sample("b", 5, learned=5), sample("c", 6, 0, images=2), skipped=("x",))
SECOND = step_data(sample("d", 3, learned=1, images=1, answer=0))


def share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank=rank, size=2, device=torch.device("cpu"), group=dist.group.WORLD)
    totals = StepTotals.gather((FIRST, SECOND)[rank], world, notes=rank, stop=rank == 1)
    torch.save(asdict(totals), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_shares_add_up(tmp_path):
    """And the most forward passes of any process are those of all; one that was asked to stop stops all."""
    mp.spawn(share, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = [asdict(StepTotals.gather(data, ALONE, stop=False)) for data in (FIRST, SECOND)]
    expected = {name: alone[0][name] + alone[1][name] for name in alone[0]} | dict(notes=1, stop=True, num_forwards=3)
    assert first == second == expected


def test_counts_by_hand():
    """A first token is never learned, so a row learned whole has one less; images without an answer align with nothing."""
    totals = StepTotals.gather(FIRST, ALONE, notes=2, stop=False)
    assert (totals.tokens, totals.samples, totals.images, totals.text_tokens, totals.visual_tokens) == (8, 3, 3, 20, 3)
    assert (totals.skipped, totals.notes, totals.stop, totals.num_forwards) == (1, 2, False, 3)
    assert (totals.aligned_rows, totals.learned_rows) == (2, 2)


def test_nothing_at_all():
    totals = StepTotals.gather(step_data(), ALONE, stop=True)
    assert totals.stop and totals.tokens == totals.num_forwards == totals.samples == 0


def test_counts_of_a_sample_without_answer():
    totals = StepTotals.gather(SECOND, ALONE, stop=False)
    assert (totals.tokens, totals.images, totals.aligned_rows, totals.learned_rows) == (1, 1, 0, 1)


def losses(loss, norm):
    return StepLosses(loss=loss, token_loss=loss, alignment_loss=None, grad_norm={"vision": norm, "total": norm})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_names_the_samples(bad):
    _check_finite(losses(1.0, 2.0), FIRST, ALONE)
    for found in (losses(bad, 1.0), losses(1.0, bad)):
        with pytest.raises(NonFiniteLossError, match=r"nothing was updated. Samples of this step: a, b, c"):
            _check_finite(found, FIRST, ALONE)


def test_each_step_and_process_draws_its_own():
    drawn = set()
    for place in [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]:
        seed_step(*place)
        first = nn.functional.dropout(torch.ones(64)).tolist()
        seed_step(*place)
        assert nn.functional.dropout(torch.ones(64)).tolist() == first
        drawn.add(tuple(first))
    assert len(drawn) == 5
