"""Compile ahead of a run: `python -m comp.warm_up [--recipe NAME] [field=value ...] [--arch sm_90]`.

Takes train.py's recipe and overrides, reads the configurations of both models and the tokenizer, no weights and no data, and
compiles the Triton kernels of attention and alignment loss into Triton's cache, as `comp_kernels.warm_up` does for other
models: for the GPU of this machine those that it will use, for --arch all. Two more, which the alignment loss needs with
several processes, are left to the first step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from transformers import AutoConfig, PretrainedConfig

from comp_kernels import alignment_loss
from comp_kernels._backends import choose_backend
from comp_kernels.warm_up import BATCHES, this_machine, warm_up

from .config import Config, ConfigError
from .config_io import apply_overrides
from .data.template import ChatTemplate, load_tokenizer, num_rows
from .model.positions import rotary_tables
from .model.vision_encoder import Attention
from .model.vit_config import ViTConfig
from .recipes import RECIPES

ROWS = 64  # samples of the alignment loss; kernels do not depend on it


def attention_calls(config: Config) -> Iterator[Callable[[], None]]:
    """Forward and backward of one attention layer, with and without rotary embedding, as the stages have it."""
    vision = ViTConfig.from_hugging_face(PretrainedConfig.get_config_dict(config.vision.path)[0])
    layer = Attention(vision).to(torch.float32 if config.precision == "fp32" else torch.bfloat16)
    for rope in sorted({stage.rope for stage in config.stages}):
        for images, tokens in BATCHES:
            positions = torch.zeros(images * tokens, 2, dtype=torch.int64)
            tables = rotary_tables(positions, vision.head_dim, base=vision.rope_base, dtype=vision.rope_dtype)
            bounds = torch.arange(0, images * tokens + 1, tokens, dtype=torch.int32)
            x = torch.zeros(images * tokens, vision.width, dtype=layer.qkv.weight.dtype)

            def call(x=x, tables=tables if rope else (None, None), bounds=bounds) -> None:
                torch.autograd.grad(layer(x, *tables, bounds, "triton").sum(), layer.qkv.weight)

            yield call


def prototype_shape(config: Config) -> tuple[int, int]:
    """(words, width) of the word embeddings, as comp.build makes them."""
    words = num_rows(ChatTemplate(load_tokenizer(config.language.tokenizer or config.language.path)).tokenizer)
    return words, AutoConfig.from_pretrained(config.language.path).get_text_config().hidden_size


def alignment_calls(config: Config) -> Iterator[Callable[[], None]]:
    """One step of each alignment loss that the stages have; prototypes in float32, and as FSDP hands them out."""
    words, dim = prototype_shape(config)
    modes = {stage.alignment.mode for stage in config.stages if stage.alignment is not None}
    for mode in sorted(modes - {"contrastive"}):
        for dtype in (torch.float32, torch.bfloat16):

            def call(mode=mode, dtype=dtype) -> None:
                vision, text = torch.zeros(ROWS, dim, requires_grad=True), torch.zeros(ROWS, dim)
                prototypes, valid = torch.empty(words, dim, dtype=dtype), torch.ones(ROWS, dtype=torch.bool)
                prior = torch.ones(words)
                loss = alignment_loss(vision, text, prototypes, prior=prior, mode=mode, valid=valid, backend="triton")
                torch.autograd.grad(loss, vision)

            yield call


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", choices=sorted(RECIPES), help="a recipe of train.py (default: tiny)")
    parser.add_argument("--arch", help='what to compile for: "sm_90", "gfx942", ..; default: the GPU of this machine')
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="as for train.py")
    options = parser.parse_args(arguments)
    try:
        config = apply_overrides(RECIPES[options.recipe](), options.overrides)
        calls: list[Callable[[], None]] = []
        for operator, make in (("rope_attention", attention_calls), ("alignment_loss", alignment_calls)):
            chosen = "triton"
            if options.arch is None:
                chosen = choose_backend(operator, None, torch.device("cuda", 0))[0] if this_machine() else chosen
            if chosen == "triton":
                calls += make(config)
            else:
                print(f"{operator} runs in the {chosen} backend here, which has nothing to compile")
        warm_up(lambda: [call() for call in calls], options.arch, jobs=options.jobs)
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        print(f"comp.warm_up: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
