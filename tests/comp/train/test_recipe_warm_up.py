"""`comp.warm_up`: what it compiles for the default recipe is what the vision tower and the alignment loss of a step launch."""

import pytest
import torch
from emulation import run_compiled

from comp import warm_up
from comp.model import VisionEncoder
from comp.recipes import RECIPES
from comp_kernels import alignment_loss
from comp_kernels._triton_compile import record, specialization

pytestmark = pytest.mark.compiles


def keys_of(*calls) -> set:
    return {specialization(launch, "sm_90") for call in calls for launch in record(call, "sm_90")}


def ahead_and_in_use() -> tuple[set, set]:
    config = RECIPES["tiny"]()
    ahead = keys_of(*warm_up.attention_calls(config), *warm_up.alignment_calls(config))
    encoder = VisionEncoder.from_pretrained(config.vision.path).float()
    encoder.backend = "triton"
    grids = torch.tensor([[1, 20, 14], [1, 4, 6]])
    pixels = torch.zeros(int(grids.prod(1).sum()), encoder.config.patch_dim)
    words, dim = warm_up.prototype_shape(config)

    def step(pos_mode):
        encoder.pos_mode = pos_mode
        with torch.autocast("cpu", torch.bfloat16):
            encoder(pixels, grids).float().sum().backward()

    def align(dtype):
        vision, text, prototypes = torch.zeros(32, dim), torch.zeros(32, dim), torch.zeros(words, dim, dtype=dtype)
        settings = dict(prior=torch.ones(words), valid=torch.ones(32, dtype=torch.bool), backend="triton")
        alignment_loss(vision.requires_grad_(), text, prototypes, **settings).backward()

    alone, with_others = (lambda: align(torch.float32)), (lambda: align(torch.bfloat16))  # as FSDP hands prototypes out
    return ahead, keys_of(lambda: step("abs"), lambda: step("abs+rope"), alone, with_others)


def test_default_recipe():
    ahead, in_use = run_compiled(ahead_and_in_use)
    assert in_use <= ahead
    features = {key for name, key in in_use if name == "features_kernel"}
    assert len(features) == 2  # one is of a GPU's products with bfloat16 prototypes
    left = sorted(name for name, _ in ahead - in_use)  # pictures of up to 64 patches
    assert left == ["attention_forward_kernel"] * 2


def test_command_line_says_what_is_wrong(capsys):
    assert warm_up.main(["--arch", "sm_90", "language.path=/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
