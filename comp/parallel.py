"""Processes and devices: one process group, the model sharded (FSDP2) or replicated over it, sums over the processes."""

from __future__ import annotations

import argparse
import atexit
import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from .config import Config, ConfigError

if TYPE_CHECKING:
    from .model.multimodal import CoMP


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""


@dataclass(kw_only=True, frozen=True, slots=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None  # None: a single process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the processes, exact for integers below 2^53."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The (picklable) value of every process, in rank order, on every process."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def rows(self, x: Tensor) -> Tensor:
        """Tensors [n, ...] of all processes, which may have different n and are equal otherwise, one after the other."""
        if self.group is None:
            return x
        lengths = [int(n) for n in self.gather(len(x))]
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        shares = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(shares, padded, group=self.group)
        return torch.cat([share[:n] for share, n in zip(shares, lengths)])

    def in_turns(self, own: Sequence[Any]) -> list[Any]:
        """The (picklable) items of all processes, of each its next one in turn: in order where item i is process i % size's."""
        shares = self.gather(own)
        return [share[turn] for turn in range(max(map(len, shares))) for share in shares if turn < len(share)]

    def in_order(self, own: Tensor, indices: Sequence[int]) -> Tensor:
        """A row per index, in their order, from processes that each have the rows of their own indices: index i belongs to
        process i % size."""
        if self.group is None:
            return own
        places = sorted(range(len(indices)), key=lambda place: (indices[place] % self.size, place))
        back = torch.empty(len(indices), dtype=torch.long)
        back[torch.tensor(places, dtype=torch.long)] = torch.arange(len(indices))
        return self.rows(own)[back.to(own.device)]

    def own(self, indices: Iterable[int]) -> list[int]:
        """Those of the indices that belong to this process, as in `in_order`."""
        return [index for index in indices if index % self.size == self.rank]

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)


def start_world(device: str = "auto") -> World:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK and so on); without those, be alone."""
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no GPU; use device=cpu or device=auto")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
    if size > 1 and not dist.is_initialized():
        # gloo beside nccl: checkpoints and gathered Python objects live on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", device_id=where if use_cuda else None)
        atexit.register(settle)
    return World(rank=rank, size=size, device=where, group=dist.group.WORLD if size > 1 else None)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what a step frees for the next one, which otherwise gets it from the system page by page: 16,000
    page faults and a tenth of the time of a small step (docs/log.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have none
        mallopt(M_MMAP_THRESHOLD, 2**25)  # its largest: blocks above are the system's all the same
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


ALONE = World(rank=0, size=1, device=torch.device("cpu"), group=None)


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """--device and --precision, for programs that `place_of` starts, alone or under torchrun."""
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="default: a GPU when there is one")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU"
    )


@dataclass(frozen=True)
class Place:
    """Where a model that does not train is asked: this process among its peers, and in which precision."""

    world: World = ALONE
    bf16: bool = False

    @property
    def device(self) -> torch.device:
        return self.world.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


CPU_ALONE = Place()


def place_of(options: argparse.Namespace) -> Place:
    """From `add_place_options`; joins the processes that torchrun started."""
    world = start_world(options.device)
    return Place(world, uses_bf16(options.precision, world))


def stop_world(world: World) -> None:
    if world.group is not None:
        dist.destroy_process_group()


def settle(patience: float = 5.0) -> None:
    """Wait until gloo's threads rest, for `patience` seconds at most; `start_world` has it run when Python exits.

    Such a thread lets go of a collective's tensors after the result is there, and needs the interpreter's lock to do so. One
    that asks for it when Python has begun to shut down is ended by it, in C++ code that nothing may leave: "terminate called
    without an active exception" (torch 2.13, Python before 3.14). Destroying the group joins its threads, but only where
    nothing else holds it, as sharded models do.
    """
    deadline, before = time.monotonic() + patience, None
    while time.monotonic() < deadline:
        now = _gloo_threads()
        if now == before and all("S (sleeping)" in thread for thread in now.values()):
            return  # and none has run while the lock was free
        before = now
        time.sleep(0.005)


def _gloo_threads() -> dict[str, tuple[str, ...]]:
    """Of each thread of gloo in this process, by its number: its state and how often it has run (on Linux)."""
    threads = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        except OSError:  # it has ended
            continue
        if fields["Name"] == "pt_gloo_runloop":
            threads[task.name] = tuple(v for k, v in fields.items() if k == "State" or k.endswith("ctxt_switches"))
    return threads


def uses_bf16(precision: str, world: World) -> bool:
    """What `Config.precision` means for the device of this process."""
    return precision == "bf16" or (precision == "auto" and world.device.type == "cuda")


def distribute(model: CoMP, config: Config, world: World) -> CoMP:
    """Move the model to the device of this process and shard it, or make all copies equal to that of rank 0."""
    if config.compile:
        compile_blocks(model)
    if not uses_fsdp(config, world):
        model.to(world.device)
        if world.group is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0, group=world.group)
        return model
    mesh = make_mesh(world, config.shard_size)
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = bf16 if uses_bf16(config.precision, world) else MixedPrecisionPolicy()
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The tables of words are among the rest. On a CPU torch adds up the gradient of a 16-bit one in 16 bits, which stops at 256
    # tokens of a kind (findings/torch_cpu_bfloat16_embedding_gradients_stop_at_256.sh); autocast casts for the products.
    fully_shard(model, mesh=mesh, mp_policy=policy if world.device.type == "cuda" else MixedPrecisionPolicy())
    for method in ("generate", "step_text"):
        register_fsdp_forward_method(model, method)
    return model


def make_mesh(world: World, shard_size: int | None) -> DeviceMesh:
    """All processes in one dimension, or groups of `shard_size` neighbours (as torchrun numbers them, processes of a node) that
    share a copy of the parameters."""
    if shard_size is None or shard_size == world.size:
        return init_device_mesh(world.device.type, (world.size,))
    if world.size % shard_size:
        raise ConfigError(f"shard_size must divide the number of processes, got shard_size={shard_size} for {world.size}")
    return init_device_mesh(world.device.type, (world.size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def compile_blocks(model: CoMP, **options: Any) -> None:
    """torch.compile every block in place (names of parameters stay), sizes of batches left open; options of torch.compile."""
    for block in transformer_blocks(model):
        block.compile(dynamic=True, **options)


def transformer_blocks(model: CoMP) -> list[nn.Module]:
    """The layers of vision encoder and language model: the units that are gathered one at a time.

    Those of the language model are what it says must not be split, without what holds a table of words: that is used from
    outside as well. ConfigError where it names none.
    """
    language_model = model.language_model
    kinds = set(language_model._no_split_modules or ())
    tables = [language_model.get_input_embeddings(), language_model.get_output_embeddings()]
    blocks: list[nn.Module] = []
    within: set[nn.Module] = set()
    for module in language_model.modules():  # the outer ones come first
        if type(module).__name__ in kinds and module not in within and not any(table in module.modules() for table in tables):
            blocks.append(module)
            within.update(module.modules())
    if not blocks:
        raise ConfigError(
            f"parallel=fsdp and compile=true need to know the layers of {type(language_model).__name__}, which names none "
            f"among its modules (_no_split_modules is {sorted(kinds)}); use parallel=replicate and compile=false"
        )
    return [*model.encoder.blocks, *blocks]


def uses_fsdp(config: Config, world: World) -> bool:
    return world.group is not None and (
        config.parallel == "fsdp" or (config.parallel == "auto" and world.device.type == "cuda")
    )


def note_trainable_changed(model: nn.Module) -> None:
    """To be called after `requires_grad` changed: FSDP reads it when parameters are first gathered, and would otherwise leave
    the gradients of parts that were frozen then in the dtype of the forward pass."""
    for module in _sharded_modules(model):
        module.unshard()  # reads it anew
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def loss_scale(model: nn.Module, world: World) -> int:
    """What to multiply a loss with before `backward`, so that gradients end up summed over the processes: sharded ones are
    averaged on the way."""
    return world.size if isinstance(model, FSDPModule) else 1


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum the gradients of replicated parameters over the processes, absent ones as zero; sharded ones are summed already.

    The list is the same everywhere whatever a process computed, so a process without images cannot hold up the others.
    """
    replicated: list[Tensor] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if not isinstance(parameter, DTensor):
            replicated.append(parameter.grad)
    if world.group is None:
        return
    for bucket in _buckets(replicated):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat, group=world.group)
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket])):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Sequence[Tensor], max_elements: int = 16 * 2**20) -> Iterable[list[Tensor]]:
    """Neighbouring tensors of one dtype in groups of about `max_elements`."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > max_elements
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, sharded or not: a float32 scalar, the same on every process."""
    norm = torch.nn.utils.get_total_norm(list(gradients))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole parameters on every process for a while, so that each may run the model as often as it likes (generation)."""
    sharded = _sharded_modules(model)
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not sharded[0], recurse=False)  # the first is the model
