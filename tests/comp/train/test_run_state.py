"""Where a run begins: at the start, at its newest intact checkpoint, or not at all, with the reason."""

import json
from dataclasses import asdict, replace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from toy import toy_config

from comp.config import ConfigError
from comp.config_io import to_dict
from comp.files import checksum, write_json
from comp.log import MetricsLog, read_records
from comp.parallel import start_world
from comp.train.checkpoint import CheckpointStore
from comp.train.run_state import RunState, claim_folder, find_state


@pytest.fixture
def run(tmp_path):
    """A folder with two checkpoints and the records up to each; -> (folder, configuration, store)."""
    config = toy_config(tmp_path)
    folder = tmp_path / "run"
    store = CheckpointStore(folder / "checkpoints", keep=2, world=start_world("cpu"))
    folder.mkdir()
    write_json(folder / "config.json", to_dict(config))
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    metrics = folder / "metrics.jsonl"
    for step in (1, 2):
        with metrics.open("a") as file:
            file.write(json.dumps({"event": "train", "step": step}) + "\n")
        state = RunState(step=step, metrics_bytes=metrics.stat().st_size, checksums={metrics.name: checksum(metrics)})
        store.save(step, model, optimizer, asdict(state))
    return folder, config, store


def test_an_empty_folder_begins_at_the_start(tmp_path):
    config, store = toy_config(tmp_path), CheckpointStore(tmp_path / "run" / "checkpoints", keep=1, world=start_world("cpu"))
    for resume in (False, True):
        assert find_state(tmp_path / "run", config, store, resume=resume) == (RunState(), None)
    claim_folder(tmp_path / "run", config, store.world)
    assert find_state(tmp_path / "run", config, store, resume=True) == (RunState(), None), "nothing was learned yet"


def test_the_newest_checkpoint(run):
    folder, config, store = run
    state, checkpoint = find_state(folder, config, store, resume=True)
    assert state.step == 2 and checkpoint == store.folder / "step-00000002"


def test_records_after_the_checkpoint_do_not_count(run):
    folder, config, store = run
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "train", "step": 3}\n{"eve')
    assert find_state(folder, config, store, resume=True)[0].step == 2


def test_a_damaged_checkpoint_is_said(run, capsys):
    folder, config, store = run
    (store.folder / "step-00000002" / ".metadata").write_bytes(b"")
    state, checkpoint = find_state(folder, config, store, resume=True)
    assert state.step == 1 and checkpoint.name == "step-00000001"
    said = capsys.readouterr().err
    assert "step-00000002 is damaged: .metadata has 0 of " in said and f"continuing from {checkpoint}" in said


def flip(content):
    return content[:9] + bytes([content[9] ^ 4]) + content[10:]


@pytest.mark.parametrize("change", [flip, lambda content: content[:-3], lambda content: bytes(len(content))])
def test_records_that_changed_are_named(run, change):
    """Before the weights are loaded, not when the run has ended and sums up."""
    folder, config, store = run
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(change(metrics.read_bytes()))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is not what it was when .*step-00000002 was written"):
        find_state(folder, config, store, resume=True)


def test_refusals(run):
    folder, config, store = run
    with pytest.raises(ConfigError, match="holds a run already; continue it with --resume"):
        find_state(folder, config, store, resume=False)
    with pytest.raises(ConfigError, match="these differ: seed"):
        find_state(folder, replace(config, seed=7), store, resume=True)
    assert find_state(folder, replace(config, bad_samples="stop", num_workers=0), store, resume=True)[0].step == 2
    for name in ("metrics.jsonl", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=rf"holds checkpoints, but .*run lacks {name}"):
            find_state(folder, config, store, resume=True)
        (folder / name).write_bytes(content)


def test_a_checkpoint_of_another_version(run):
    folder, config, store = run
    path = store.folder / "step-00000002"
    (path / "files.json").unlink()
    write_json(path / "progress.json", {"step": 2, "colour": 1})
    with pytest.raises(ConfigError, match=r"is of another version: .*colour"):
        find_state(folder, config, store, resume=True)
    write_json(path / "progress.json", {"step": 2})  # an older one, with fewer fields
    assert find_state(folder, config, store, resume=True)[0] == RunState(step=2)


def test_a_record_is_whole_where_the_disk_takes_it_in_parts(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", None)
    file, records = log._file, [dict(event="note", step=step, message="x" * 50) for step in range(3)]
    log._file = Mock(write=lambda data: file.write(data[:7]), close=file.close)
    for record in records:
        log.write(record)
    log.close()
    assert read_records(tmp_path / "metrics.jsonl") == records
