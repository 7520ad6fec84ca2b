"""Compile ahead of the first step: `python -m comp_kernels.warm_up FOLDER`.

    python -m comp_kernels.warm_up Qwen2.5-VL-7B-Instruct                       # for this machine's GPU, bfloat16, training
    python -m comp_kernels.warm_up timm_vit --arch sm_90 --dtype float16 --forward

FOLDER has the config.json of a transformers or timm model that `patch_transformers` or `patch_timm` knows; weights are not
needed. One attention module of each kind is called on the CPU, and the Triton kernels that it would launch are compiled into
Triton's cache (TRITON_CACHE_DIR, or ~/.triton/cache) by several processes. Kernels do not depend on the sizes of a batch, so
there are five to ten. Where the CUDA library serves this machine's GPU, attention needs no Triton kernel.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from . import _triton
from ._backends import choose_backend
from ._checks import check_integer
from ._triton_compile import compile_ahead, record
from .integrations._patching import Foreign

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# (images, tokens of each): keys are turned once for images of more than 64 tokens on average, in the loop for others.
BATCHES = ((2, 300), (8, 64))


def warm_up(
    call: Callable[[], object], arch: str | None = None, *, jobs: int | None = None, say: Callable[[str], object] = print
) -> int:
    """Compile the Triton kernels that `call` launches; returns how many there are.

    call:  is run once with its launches left out: shapes, dtypes and strides must be right, values need not be. Tensors are on
           the CPU, operators are called with backend="triton".
    arch:  "sm_90", "gfx942", ..; default: this machine's GPU.
    jobs:  processes; default: one per core.
    say:   receives a line per kernel, and one at the end.

    Raises RuntimeError without Triton, ValueError without a GPU or `arch`, or for fewer jobs than one.
    """
    if jobs is not None:
        check_integer("jobs", jobs, least=1)
    arch = arch or this_machine()
    reason = _triton.unavailable_reason(torch.device("cuda"))
    if reason:
        raise RuntimeError(reason)
    began, kernels = time.monotonic(), []
    for kernel in compile_ahead(record(call, arch), arch, jobs):
        kernels.append(kernel)
        say(f"{kernel.name}: " + ("was there" if kernel.from_cache else f"{kernel.seconds:.1f} s"))
    compiled = sum(not kernel.from_cache for kernel in kernels)
    say(f"{len(kernels)} kernels for {arch}, {compiled} of them compiled, in {time.monotonic() - began:.0f} s")
    return len(kernels)


def this_machine() -> str:
    """The architecture of the first GPU."""
    if not torch.cuda.is_available():
        raise ValueError('arch must be given where there is no GPU: "sm_80", "sm_90", "gfx942", ..')
    return _triton.architecture(torch.device("cuda"))


# --- the attention of other people's models ----------------------------------------------------------------------------------


def model_call(folder: Path, dtype: torch.dtype, *, backward: bool = True) -> Callable[[], None]:
    """A function that calls every kind of attention module of the model that `folder` describes, with each of BATCHES.

    Raises FileNotFoundError without a config.json, ValueError for a model without an attention that is known here.
    """
    is_timm = "architecture" in json.loads((folder / "config.json").read_text())
    calls = list((timm_calls if is_timm else transformers_calls)(folder, dtype))

    def call() -> None:
        for module, arguments in calls:
            out = module(**arguments)
            out = out[0] if isinstance(out, tuple) else out
            if backward:
                tensors = (*module.parameters(), *arguments.values())
                torch.autograd.grad(out.sum(), [x for x in tensors if isinstance(x, Tensor) and x.requires_grad])

    return call


def one_of_each_kind(model: nn.Module, names: list[str], dtype: torch.dtype) -> Iterator[Foreign]:
    """Modules of `model`, which has no memory, that differ in class or sizes, each alone and with memory on the CPU."""
    seen = set()
    for name in names:
        module = model.get_submodule(name)
        kind = (type(module), *(p.shape for p in module.parameters()))
        if kind not in seen:
            seen.add(kind)
            yield copy.deepcopy(module).to_empty(device="cpu").to(dtype).eval()  # eval: without dropout


def input_width(attention: nn.Module) -> int:
    """Channels of its hidden states, which the first linear layer of every family takes."""
    return next(layer for layer in attention.modules() if isinstance(layer, nn.Linear)).in_features


def transformers_calls(folder: Path, dtype: torch.dtype) -> Iterator[tuple[nn.Module, dict]]:
    """(attention module, arguments)."""
    import transformers

    from .integrations.transformers import complex_tables, patch_transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        try:
            model = transformers.AutoModel.from_config(config)
        except ValueError:  # a model without a body of its own, as Qwen2.5-Omni
            if not config.architectures or not hasattr(transformers, config.architectures[0]):
                raise
            model = getattr(transformers, config.architectures[0])._from_config(config)
    for module in one_of_each_kind(model, patch_transformers(model, backend="triton"), dtype):
        family = module._comp_kernels_patch.family
        inputs = input_width(module)
        rotary_dim = family.rotary_dim(module.head_dim) or module.head_dim
        for images, tokens in BATCHES:
            rows = images * tokens if family.packed else tokens
            x = torch.zeros(images, tokens, inputs, dtype=dtype)
            arguments: dict[str, object] = dict(hidden_states=x.flatten(0, 1) if family.packed else x)
            if family.packed:
                arguments["cu_seqlens"] = torch.arange(0, rows + 1, tokens, dtype=torch.int32)
            if family.tables is complex_tables:
                arguments["freqs_ci"] = torch.ones(rows, 1, rotary_dim // 2, dtype=torch.complex64)
            elif family.tables is not None:
                arguments["position_embeddings"] = (torch.ones(rows, rotary_dim), torch.zeros(rows, rotary_dim))
            yield module, arguments


def timm_calls(folder: Path, dtype: torch.dtype) -> Iterator[tuple[nn.Module, dict]]:
    """(attention module, arguments); the model itself, without memory, shows which rotary embedding its modules are given."""
    import timm

    from .integrations.timm import patch_timm

    description = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model: Foreign = timm.create_model(
            description["architecture"], pretrained=False, **description.get("model_args", {})
        ).eval()
        images = torch.zeros(1, *(description.get("pretrained_cfg") or model.default_cfg)["input_size"])
    rotary: dict[type, Tensor | None] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rotary.setdefault(type(module), args[1] if len(args) > 1 else kwargs.get("rope"))  # of two tables, the first

    names = patch_timm(model, backend="reference")
    hooks = [model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in names]
    model(images)
    for hook in hooks:
        hook.remove()
    patch_timm(model, backend="triton")
    learned = any("rope" in name for name, _ in model.named_parameters())
    for module in one_of_each_kind(model, names, dtype):
        rope, inputs = rotary.get(type(module)), input_width(module)
        names_of_tables = [name for name in module._comp_kernels_patch.family.parameters if "rope" in name]
        for count, tokens in BATCHES:
            arguments = dict(x=torch.zeros(count, tokens, inputs, dtype=dtype))
            if rope is not None:
                shape = (*rope.shape[:-2], tokens - getattr(module, "num_prefix_tokens", 0), rope.shape[-1])
                arguments |= {name: torch.zeros(shape, requires_grad=learned) for name in names_of_tables}
            yield module, arguments


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with the config.json of a model")
    parser.add_argument("--arch", help='what to compile for: "sm_90", "gfx942", ..; default: the GPU of this machine')
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of q, k and v (default: bfloat16)")
    parser.add_argument("--forward", action="store_true", help="without the kernels of the backward pass")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    try:
        if options.arch is None:
            chosen = choose_backend("rope_attention", None, torch.device("cuda", 0))[0] if this_machine() else None
            if chosen != "triton":
                print(
                    f"attention runs in the {chosen} backend here, which has nothing to compile; --arch compiles all the same"
                )
                return 0
        call = model_call(options.folder, DTYPES[options.dtype], backward=not options.forward)
        warm_up(call, options.arch, jobs=options.jobs)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"comp_kernels.warm_up: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
