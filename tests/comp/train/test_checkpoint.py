"""CheckpointStore by itself: saving changes nothing, a fresh optimiser stays fresh on disk, the newest checkpoints stay."""

import pytest
import torch
from torch import nn

from comp.parallel import start_world
from comp.train.checkpoint import CheckpointStore, read_progress


def parts(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)


def update(model, optimizer):
    model(torch.arange(4.0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, keep=2, world=start_world("cpu"))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_saving_changes_nothing(store, before):
    """Before the first update too: torch fills the state of such an optimiser and counts that as an update."""
    expected = parts()
    for _ in range(before + 2):
        update(*expected)
    model, optimizer = parts()
    for _ in range(before):
        update(model, optimizer)
    store.save(before, model, optimizer, {})
    for _ in range(2):
        update(model, optimizer)
    torch.testing.assert_close(weights(model), weights(expected[0]), rtol=0, atol=0)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_loaded_run_goes_on_as_the_saved_one(store, before):
    model, optimizer = parts()
    for _ in range(before):
        update(model, optimizer)
    path = store.save(before, model, optimizer, {"seen": before})
    other, other_optimizer = parts(seed=1)
    store.load(path, other, other_optimizer)
    for _ in range(2):
        update(model, optimizer)
        update(other, other_optimizer)
    torch.testing.assert_close(weights(other), weights(model), rtol=0, atol=0)
    assert read_progress(path) == {"seen": before}


def test_the_newest_stay(store):
    model, optimizer = parts()
    for step in (1, 2, 3):
        store.save(step, model, optimizer, {})
    assert [path.name for path in store.complete()] == ["step-00000002", "step-00000003"]
    assert store.latest().name == "step-00000003"
