"""Sums over processes, alone and as two: counts, gradients of replicas, norms of whole and sharded gradients."""

import platform
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from comp import parallel
from comp.config import ConfigError
from comp.parallel import World, start_world, sum_gradients, total_norm

ALONE = World(rank=0, size=1, device=torch.device("cpu"), group=None)


def test_alone_everything_is_its_own_sum():
    assert ALONE.is_main and ALONE.sum([2, 3.5]) == ALONE.max([2, 3.5]) == [2, 3.5] and ALONE.gather("a") == ["a"]
    ALONE.barrier()


def test_a_process_without_peers(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert start_world("cpu") == ALONE
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda, but torch finds no GPU"):
            start_world("cuda")


def test_absent_gradients_are_zeros_and_frozen_parameters_have_none():
    used, unused, frozen = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    used.grad = torch.tensor([1.0, 2.0, 2.0])
    sum_gradients([used, unused, frozen], ALONE)
    assert used.grad.tolist() == [1, 2, 2] and unused.grad.tolist() == [0, 0, 0] and frozen.grad is None
    assert total_norm([used.grad, unused.grad]) == 3


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank=rank, size=2, device=torch.device("cpu"), group=dist.group.WORLD)
    large = 2**51 + rank  # exact as float64, not as float32
    found = dict(
        main=world.is_main, sum=world.sum([rank + 1, large]), max=world.max([rank, -rank]), gather=world.gather({rank})
    )

    # parameters of several shapes and dtypes; each process lacks another gradient
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in SHAPES]
    for number, parameter in enumerate(parameters):
        if number % 2 == rank or number > 2:
            parameter.grad = torch.full_like(parameter, 10.0**rank)
    sum_gradients(parameters, world)
    found["gradients"] = [parameter.grad.unique().tolist() for parameter in parameters]

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(6.0)
    sharded = nn.Parameter(distribute_tensor(torch.zeros(6), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(whole, mesh, [Shard(0)])
    sum_gradients([sharded], world)  # is summed already
    found["sharded"] = sharded.grad.full_tensor().tolist()
    found["norm"] = total_norm([sharded.grad]).item()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


SHAPES = [((2, 3), torch.float32), ((4,), torch.float32), ((), torch.float32), ((5,), torch.bfloat16), ((7,), torch.float64)]


@pytest.mark.slow
def test_two_processes(tmp_path):
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first.pop("main") and not second.pop("main")
    assert first == second, "the same on every process"
    assert first["sum"] == [3, 2**52 + 1] and first["max"] == [1, 0] and first["gather"] == [{0}, {1}]
    assert first["gradients"] == [[1], [10], [1], [11], [11]]
    assert first["sharded"] == [0, 1, 2, 3, 4, 5]
    assert first["norm"] == pytest.approx(55**0.5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide by themselves what they keep")
def test_what_a_step_frees_on_a_cpu_is_there_for_the_next_one():
    """120 MiB in blocks of 4: page faults of the second time, in a process of its own because malloc remembers."""
    lines = """
        import resource, torch
        from comp.parallel import start_world
        start_world("cpu")
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.ones(2**20) for _ in range(30)]
            del blocks
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 5_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at its threads in /proc")
def test_the_end_of_a_process_waits_until_gloos_threads_rest(monkeypatch):
    """One that is at work, one that sleeps but has run since the last look, and no change from there on."""
    looks = [
        {"7": ("R (running)", "4")},
        {"7": ("S (sleeping)", "5")},
        {"7": ("S (sleeping)", "6")},
        {"7": ("S (sleeping)", "6")},
    ]
    waiting = iter(looks)
    monkeypatch.setattr(parallel, "_gloo_threads", lambda: next(waiting))
    parallel.settle()
    assert next(waiting, None) is None  # it looked until two looks were equal

    started = time.monotonic()
    monkeypatch.setattr(parallel, "_gloo_threads", lambda: {"7": ("R (running)", "4")})
    parallel.settle(patience=0.05)  # one that never rests does not hold up the end
    assert time.monotonic() - started < 5


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at its threads in /proc")
def test_gloos_threads_are_found():
    """By their name, which torch could change: with none found nothing would be waited for."""
    lines = """
        import os, random
        port = str(random.randint(20000, 40000))
        os.environ |= dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        rank = 0 if (child := os.fork()) else 1
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
        from comp import parallel
        world = parallel.start_world("cpu")
        world.barrier()
        assert len(parallel._gloo_threads()) > 0
        assert not child or os.waitpid(child, 0)[1] == 0
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
