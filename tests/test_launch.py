"""The documented ways to start several processes, run small on this machine: torchrun, and the Slurm script on two "nodes"."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from comp.log import read_records

REPOSITORY = Path(__file__).parent.parent
USAGE = (REPOSITORY / "docs" / "usage.md").read_text()
SMALL = "'stages.*.max_steps=1' 'stages.*.batch_size=4' eval.data=[] eval.encoder=[] tensorboard=false device=cpu"


@pytest.fixture
def tools(tmp_path):
    """A folder for PATH with what a Slurm cluster has: `srun` starts its command once per node."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "scontrol": '[ "$1 $2 $3" = "show hostnames node[0-1]" ] && printf "localhost\\nlocalhost\\n"',
        "srun": '"$@" & first=$!\n"$@" & second=$!\nwait $first && wait $second',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run(script, folder, tools):
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment |= {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7"}
    script = f"{script} {SMALL} output_dir={folder} name=launched"
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=540)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers, which are no part of the group
        process.communicate()
        raise
    assert process.returncode == 0, output
    steps = read_records(folder / "launched" / "metrics.jsonl", "train")
    assert [record["samples"] for record in steps] == [4] * 4, "a batch is the global one, whatever the number of processes"
    return (folder / "launched" / "summary.json").read_text()


@pytest.mark.slow
def test_torchrun_on_one_machine_with_own_data(tmp_path, tools, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"^## Your own data$.*?^```python\n(.*?)^```$", USAGE, flags=re.MULTILINE | re.DOTALL)[1]
    exec(example, {})  # writes mine.jsonl, one sample
    (tmp_path / "eight.jsonl").write_text((tmp_path / "mine.jsonl").read_text() * 8)
    command = re.search(r"^torchrun --nproc-per-node 2 train.py .*$", USAGE, flags=re.MULTILINE)[0]
    command = command.replace("torchrun", f"torchrun --master-port {free_port()}")
    assert '"processes": 2' in run(f"{command} 'stages.*.data=[{{path: {tmp_path / 'eight.jsonl'}}}]'", tmp_path, tools)


@pytest.mark.slow
def test_slurm_script_on_two_nodes(tmp_path, tools):
    script = re.search(r"^```slurm\n(.*?)\n```$", USAGE, flags=re.MULTILINE | re.DOTALL)[1]
    small = {"--nproc-per-node 8": "--nproc-per-node 1", ":29500": f":{free_port()}", " --recipe siglip-so400m_qwen2.5-7b": ""}
    for documented, here in small.items():
        assert documented in script
        script = script.replace(documented, here)
    assert '"processes": 2' in run(script, tmp_path, tools)
