"""Vision towers of other libraries before and after patching: forward and backward at native resolution.

    python -m benchmarks.integrations                                # all towers, released widths, two layers each
    python -m benchmarks.integrations --towers dinov3 --layers 4 --repeats 9 --dtype bfloat16

Patched and unpatched runs alternate in one process; the figure is the ratio of their medians. The unpatched model runs as its
library ships it (scaled_dot_product_attention). Layers are alike, so two stand for all but patch embedding and head.
`--clock cpu` counts processor time of all threads instead of wall time, for a CPU that is shared with other work.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig

from comp_kernels.integrations import patch_transformers

GRIDS = ((50, 36), (24, 42), (16, 60), (32, 24), (14, 20), (10, 10))
"""Rows and columns of patches of a batch at native resolution: a page, photographs, a strip, icons; 4,916 patches."""
PHOTOGRAPH = (63, 84)
SQUARES = 8
"""Images of 384 pixels in a batch of one size."""


class Tower(NamedTuple):
    model: nn.Module
    inputs: dict[str, Tensor]
    title: str
    patch: Callable = patch_transformers
    images: int = len(GRIDS)


def padded() -> tuple[Tensor, Tensor]:
    """[images, longest, 2] rows and columns of patches padded to the largest image, and which are real, [images, longest]."""
    grids = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in GRIDS]
    coordinates = nn.utils.rnn.pad_sequence(grids, batch_first=True)
    lengths = torch.tensor([len(grid) for grid in grids])
    return coordinates, torch.arange(coordinates.shape[1]) < lengths[:, None]


def siglip(layers: int) -> Tower:
    """So400m at its fixed size."""
    config = transformers.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_attention_heads=16,
        num_hidden_layers=layers,
        image_size=384,
        patch_size=14,
    )
    config.vision_use_head = False
    inputs = dict(pixel_values=torch.randn(SQUARES, 3, 384, 384))
    return Tower(transformers.SiglipVisionModel(config), inputs, "SigLIP So400m, 384 pixels", images=SQUARES)


def siglip2(layers: int) -> Tower:
    """NaFlex: padded to the largest image."""
    config = transformers.Siglip2VisionConfig(num_hidden_layers=layers, vision_use_head=False)
    _, real = padded()
    inputs = dict(
        pixel_values=torch.randn(*real.shape, 768), spatial_shapes=torch.tensor(GRIDS), pixel_attention_mask=real.long()
    )
    return Tower(transformers.Siglip2VisionModel(config), inputs, "SigLIP 2 base, NaFlex, padded batch")


def pixtral(layers: int) -> Tower:
    """Six images in one row behind a dense mask of blocks."""
    config = transformers.PixtralVisionConfig(num_hidden_layers=layers)
    height, width = (16 * max(grid[axis] for grid in GRIDS) for axis in (0, 1))
    sizes = [(16 * rows, 16 * columns) for rows, columns in GRIDS]
    inputs = dict(pixel_values=torch.randn(len(GRIDS), 3, height, width), image_sizes=sizes)
    return Tower(transformers.PixtralVisionModel(config), inputs, "Pixtral, images packed behind a mask")


def qwen2_5_vl(layers: int) -> Tower:
    """Every eighth layer attends within images, the others within windows, as released; of fewer than eight every second."""
    every = 8 if layers >= 8 else 2
    config = Qwen2_5_VLVisionConfig(
        depth=layers, hidden_size=1280, fullatt_block_indexes=list(range(every - 1, layers, every)), out_hidden_size=1280
    )
    grids = torch.tensor([(1, *grid) for grid in GRIDS])
    inputs = dict(hidden_states=torch.randn(int(grids.prod(1).sum()), 3 * 2 * 14 * 14), grid_thw=grids)
    return Tower(Qwen2_5_VisionTransformerPretrainedModel(config), inputs, "Qwen2.5-VL, packed, windows and whole images")


def dinov3(layers: int) -> Tower:
    """One photograph of 1008 x 1344 pixels, ViT-S."""
    height, width = (16 * side for side in PHOTOGRAPH)
    config = transformers.DINOv3ViTConfig(num_hidden_layers=layers, num_register_tokens=4)
    inputs = dict(pixel_values=torch.randn(1, 3, height, width))
    return Tower(transformers.DINOv3ViTModel(config), inputs, "DINOv3 ViT-S, one image of 5292 patches", images=1)


def naflexvit(layers: int) -> Tower:
    """timm's ViT-B for native sizes, with its 2D rotary embedding, padded to the largest image."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    from comp_kernels.integrations import patch_timm

    config = NaFlexVitCfg(patch_size=16, embed_dim=768, depth=layers, num_heads=12, rope_type="axial", pos_embed="none")
    coordinates, real = padded()
    inputs = dict(x=torch.randn(*real.shape, 768), patch_coord=coordinates, patch_valid=real)
    return Tower(NaFlexVit(config, num_classes=0), inputs, "timm NaFlexViT base, rotary, padded batch", patch_timm)


TOWERS: dict[str, Callable] = {build.__name__: build for build in (siglip, siglip2, pixtral, qwen2_5_vl, dinov3, naflexvit)}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def hidden_state(output) -> Tensor:
    """The tokens that a tower returns, alone or in an output of transformers."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def forward_backward(model: nn.Module, inputs: dict[str, Tensor], clock: Callable[[], float]) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    begin = clock()
    hidden_state(model(**inputs)).float().sum().backward()
    return clock() - begin


def measure(name: str, layers: int, repeats: int, dtype: torch.dtype, backend: str | None, clock: Callable[[], float]) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    model, inputs, title, patch = TOWERS[name](layers)
    model = model.to(dtype)
    inputs = {key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in inputs.items()}
    patched = copy.deepcopy(model)
    patch(patched, backend=backend)
    times: dict[str, list[float]] = {"before": [], "after": []}
    for repeat in range(repeats + 1):
        for label, one in (("before", model), ("after", patched)):
            seconds = forward_backward(one, inputs, clock)
            if repeat:  # the first is for warming up
                times[label].append(seconds)
    before, after = (statistics.median(times[label]) for label in times)
    ratios = sorted(b / a for b, a in zip(times["before"], times["after"]))
    return f"| {title} | {1e3 * before:.0f} | {1e3 * after:.0f} | {before / after:.2f} | {ratios[0]:.2f} .. {ratios[-1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", help="of rope_attention; default: by device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{options.layers} layers, {options.dtype}, {options.threads} threads, {options.clock} time, "
        f"median of {options.repeats}\n"
    )
    print("| tower | before, ms | after, ms | speed-up | of pairs |\n| --- | ---: | ---: | ---: | ---: |")
    for name in options.towers:
        dtype, clock = getattr(torch, options.dtype), CLOCKS[options.clock]
        print(measure(name, options.layers, options.repeats, dtype, options.backend, clock), flush=True)


if __name__ == "__main__":
    main()
