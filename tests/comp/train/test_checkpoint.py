"""CheckpointStore by itself: saving changes nothing, a fresh optimiser stays fresh on disk, the newest checkpoints stay, damage
and full disks are named."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from comp.config import ConfigError
from comp.parallel import start_world
from comp.train.checkpoint import CheckpointError, CheckpointStore, changed, read_progress


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


def test_parameters_without_a_gradient_so_far(store):
    """Frozen for a while, or of a branch that no sample took: saved and loaded with the others, and first updated later."""

    def partly(model, optimizer):
        model[0](torch.arange(4.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = parts()
    expected = parts()
    for _ in range(3):
        partly(model, optimizer)
        partly(*expected)
    path = store.save(3, model, optimizer, {})
    assert not any(p in optimizer.state for p in model[1].parameters()), "saving changes nothing"
    other, other_optimizer = parts(seed=1)
    store.load(path, other, other_optimizer)
    running, running_optimizer = parts(seed=2)
    partly(running, running_optimizer)
    store.load(path, running, running_optimizer)
    for _ in range(2):
        for one in ((model, optimizer), expected, (other, other_optimizer), (running, running_optimizer)):
            update(*one)
    for one in (model, other, running):
        torch.testing.assert_close(weights(one), weights(expected[0]), rtol=0, atol=0)


def test_what_a_kill_left_is_removed(store):
    model, optimizer = parts()
    for name in (".writing-step-00000001", ".writing-step-00000007"):
        (store.folder / name).mkdir()
        (store.folder / name / "__0_0.distcp").write_bytes(b"half")
    store.save(2, model, optimizer, {})
    assert [path.name for path in store.folder.iterdir()] == ["step-00000002"]


@contextmanager
def files_of_at_most(num_bytes):
    """As on a full disk: longer files cannot be written by this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_that_names_the_last_good_checkpoint(store):
    model = nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    for good in (None, store.folder / "step-00000001"):
        with pytest.raises(CheckpointError) as caught, files_of_at_most(2**16):
            store.save(2, model, optimizer, {})
        message = str(caught.value)
        assert "\n" not in message and f"step-00000002 cannot be written to {store.folder}: " in message
        assert "GiB free" in message and message.endswith(f"The last good checkpoint is {good or 'none'}")
        assert [path.name for path in store.folder.iterdir()] == ([good.name] if good else [])
        store.save(1, model, optimizer, {})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of a byte in the middle, as discs and memory lose them: the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def zeros(path):
    """As a power cut leaves a file whose length reached the disc before its content."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "progress.json", "files.json"])
@pytest.mark.parametrize("damaged", [cut, flip, zeros, lambda path: path.unlink(), lambda path: path.write_bytes(b"[1]")])
def test_the_newest_intact_checkpoint_is_found(store, name, damaged):
    model, optimizer = parts()
    for step in (1, 2):
        store.save(step, model, optimizer, {"step": step})
    newest = store.folder / "step-00000002"
    damaged(newest / name)
    path, problems = store.newest_intact()
    if not (newest / name).exists() and name in ("progress.json", "files.json"):
        # without progress it was never finished; without the list of files it is as old versions wrote it
        assert path.name == ("step-00000001" if name == "progress.json" else "step-00000002") and not problems
        return
    assert path.name == "step-00000001" and len(problems) == 1
    assert problems[0].startswith(f"checkpoint {newest} is damaged: ")
    assert name in problems[0] or name == "files.json"  # a list that is wrong accuses a file that is right
    damaged(store.folder / "step-00000001" / name)
    path, problems = store.newest_intact()
    assert path is None and len(problems) == 2


def test_checkpoints_of_older_versions_are_judged_by_sizes(store):
    model, optimizer = parts()
    for step in (1, 2):
        path = store.save(step, model, optimizer, {})
        (path / "files.json").unlink()
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        (path / "sizes.json").write_text(json.dumps(sizes))
    assert store.newest_intact() == (path, [])
    store.load(path, model, optimizer)
    cut(path / ".metadata")
    assert store.newest_intact()[0].name == store.newest_whole().name == "step-00000001"


def test_each_file_is_looked_at_by_one_process(store):
    model, optimizer = parts()
    path = store.save(1, model, optimizer, {})
    names = list(json.loads((path / "files.json").read_text()))
    assert sorted(names) == sorted(file.name for file in path.iterdir() if file.name != "files.json")
    flip(path / "__0_0.distcp")
    found = [changed(path, rank, 3) for rank in range(3)]
    assert sum(problem is not None for problem in found) == 1
    assert "the content of __0_0.distcp has changed since it was written" in found


def test_a_checkpoint_that_cannot_be_loaded_is_named(store):
    """Here of an older version, which noted nothing of its files."""
    model, optimizer = parts()
    path = store.save(1, model, optimizer, {})
    (path / "files.json").unlink()
    zeros(path / ".metadata")
    assert store.newest_intact() == (path, [])
    with pytest.raises(ConfigError, match=r"checkpoint .*step-00000001 cannot be loaded: "):
        store.load(path, model, optimizer)


def test_later_checkpoints_go_when_a_run_goes_back(store):
    """Else they would be kept as the newest, and the good one deleted."""
    model, optimizer = parts()
    for step in (2, 4):
        store.save(step, model, optimizer, {})
    cut(store.folder / "step-00000004" / ".metadata")
    store.save(3, model, optimizer, {})
    assert [path.name for path in store.complete()] == ["step-00000002", "step-00000003"]
