"""The main job, `train.py`, from its start: seconds to the first step, images per second, peak memory, share of attention.

Stage II-b of the recipe `tiny` (native sizes, all parts train, both losses) without evaluation. `train` begins with an empty
cache of Triton's, `train_again` finds it filled; `fsdp` runs some steps sharded by FSDP2 over a process group of one (NCCL on a
GPU, in bfloat16), beside the same steps unsharded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
from unittest import mock

import torch
import torch.distributed as dist

from comp.config import Config
from comp.config_io import apply_overrides
from comp.log import read_records
from comp.parallel import World
from comp.recipes import RECIPES
from comp.train.startup import process_age
from comp.train.trainer import Trainer

from .session import Session

STEPS, TINY_STEPS = 100, 6
SKIPPED = 0.3  # share of the steps before the rate is taken
PROFILED = 3  # steps at the end
ATTENTION = ("DirectAttention", "comp_kernels::rope_attention")  # how the profiler names calls of rope_attention


def train(session: Session) -> None:
    shutil.rmtree(cache_of(session), ignore_errors=True)
    run(session, "train", TINY_STEPS if session.tiny else STEPS, "empty")


def train_again(session: Session) -> None:
    run(session, "train_again", TINY_STEPS, "filled" if cache_of(session).exists() else "empty")


def cache_of(session: Session):
    return session.out.absolute() / "triton_cache"


def run(session: Session, name: str, steps: int, cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(cache_of(session))
    config = job(session, name, steps)
    if not session.tiny:
        torch.cuda.reset_peak_memory_stats()
    trainer = MeasuredTrainer(config)
    trainer.run()
    records = steps_of(trainer)
    counted = records[int(SKIPPED * steps) : steps - PROFILED]
    seconds = sum(record["step_time"] for record in counted)
    session.say(
        steps=len(records),
        cache=cache,
        first_step_s=round(trainer.first_step, 1),
        images_per_s=round(sum(record["images"] for record in counted) / seconds, 1),
        step_ms=round(1e3 * statistics.median(record["step_time"] for record in counted), 1),
        data_ms=round(1e3 * statistics.median(record["data_time"] for record in counted), 1),
        peak_mib=None if session.tiny else round(torch.cuda.max_memory_allocated() / 2**20),
        attention_share=round(trainer.attention_share(), 3),
        loss=[round(records[i]["loss"], 3) for i in (0, -1)],
    )


def job(session: Session, name: str, steps: int, *overrides: str) -> Config:
    """The run of one stage; on the CPU of few samples."""
    config = RECIPES["tiny"]()
    stage = config.stages[2]
    config.stages, config.eval.data, config.eval.encoder = [stage], [], ()
    for source in stage.data:
        source.arguments |= {"size": 64} if session.tiny else {}
    folder = session.out / "runs"
    shutil.rmtree(folder / name, ignore_errors=True)
    settings = [f"stages.0.max_steps={steps}", f"name={name}", f"output_dir={folder}", "tensorboard=false"]
    settings += [f"device={session.device}", *(["stages.0.batch_size=4"] if session.tiny else []), *overrides]
    return apply_overrides(config, settings)


def steps_of(trainer: Trainer) -> list[dict]:
    """The records of its steps."""
    return read_records(trainer.folder / "metrics.jsonl", "train")


class MeasuredTrainer(Trainer):
    """The trainer, which notes when its first step was done and profiles the last ones."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.first_step = 0.0
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * (self.world.device.type == "cuda")
        self.profile = torch.profiler.profile(activities=activities)

    def _step(self, *arguments, **settings) -> bool:
        profiled = self.state.step_in_stage >= len(self.datasets[0]) - PROFILED
        with self.profile_step() if profiled else contextlib.nullcontext():
            stop = super()._step(*arguments, **settings)
            self.first_step = self.first_step or process_age()
        return stop

    @contextlib.contextmanager
    def profile_step(self):
        """Within, kernels are traced; those that are still queued when it ends too."""
        if self.state.step_in_stage == len(self.datasets[0]) - PROFILED:
            self.profile.start()
        yield
        if self.state.step_in_stage == len(self.datasets[0]):
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
            self.profile.stop()

    def attention_share(self) -> float:
        """Of the time of all kernels in the profiled steps (on the CPU: of all operators), that of rope_attention."""
        events = self.profile.key_averages()
        kind = "device" if self.world.device.type == "cuda" else "cpu"
        whole = sum(getattr(event, f"self_{kind}_time_total") for event in events)
        return sum(getattr(event, f"{kind}_time_total") for event in events if event.key.startswith(ATTENTION)) / whole


# --- FSDP2 -------------------------------------------------------------------------------------------------------------------


def fsdp(session: Session) -> None:
    """Losses of the same steps, sharded and not: FSDP2 gathers and reduces, but over one process nothing may change beyond
    the rounding of parameters to bfloat16, which autocast and FSDP2 do at other places."""
    steps = 4 if session.tiny else 20
    plain = Trainer(job(session, "plain", steps, "precision=bf16"))
    plain.run()
    with group_of_one(session.device) as world, mock.patch("comp.train.trainer.start_world", lambda device: world):
        sharded = Trainer(job(session, "fsdp", steps, "precision=bf16", "parallel=fsdp"))
        sharded.run()
    found, expected = ([record["loss"] for record in steps_of(trainer)] for trainer in (sharded, plain))
    times = [[1e3 * record["step_time"] for record in steps_of(trainer)] for trainer in (sharded, plain)]
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, expected))
    sharded_ms, plain_ms = (round(statistics.median(ms[steps // 2 :]), 1) for ms in times)
    parameters = sum(type(p).__name__ == "DTensor" for p in sharded.model.parameters())
    session.say(steps=steps, dtensors=parameters, loss_difference=difference, sharded_ms=sharded_ms, plain_ms=plain_ms)
    if not difference < 0.05 or parameters == 0:
        raise SystemExit(f"losses differ by {difference:.2%}, {parameters} parameters are sharded: {found} against {expected}")


@contextlib.contextmanager
def group_of_one(device: str):
    """A world with a process group, as torchrun with one process would not make it."""
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    with tempfile.NamedTemporaryFile() as store:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        settings = dict(device_id=where) if device == "cuda" else {}
        dist.init_process_group(backend, init_method=f"file://{store.name}.store", rank=0, world_size=1, **settings)
        try:
            yield World(rank=0, size=1, device=where, group=dist.group.WORLD)
        finally:
            dist.destroy_process_group()
