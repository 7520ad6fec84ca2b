"""What `comp_kernels.warm_up` compiles for a model is what the model launches, by Triton's keys; nothing is compiled."""

import json

import pytest
import torch
import transformers
from emulation import run_compiled
from parity import with_parameters_in
from torchvision_stub import import_timm
from transformers_towers import TOWERS

from comp_kernels._triton_compile import record, specialization
from comp_kernels.integrations import patch_transformers
from comp_kernels.warm_up import model_call

pytestmark = pytest.mark.compiles

# have no folder of the tower alone
WHOLE = {
    "qwen2_vl": "Qwen2VLConfig",
    "llama4": "Llama4Config",
    "minimax_m3_vl": "MiniMaxM3VLConfig",
    "minicpmv4_6": "MiniCPMV4_6Config",
    "step3p7": "Step3p7Config",
    "janus": "JanusConfig",
}


def whole_model(name: str, tower: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    vision = {"vision_config": tower.to_dict()}
    if name == "qwen2_5_omni":
        return transformers.Qwen2_5OmniConfig(thinker_config=vision, architectures=["Qwen2_5OmniForConditionalGeneration"])
    return getattr(transformers, WHOLE[name])(**vision) if name in WHOLE else tower


def keys_of(call) -> set:
    return {specialization(launch, "sm_90") for launch in record(call, "sm_90")}


def ahead_and_in_use(name: str, folder: str) -> tuple[set, set]:
    """(keys from the folder of a tower's configuration, keys of a training step of the tower itself), in bfloat16."""
    tower = TOWERS[name]()
    whole_model(name, tower.model.config).save_pretrained(folder)
    model = with_parameters_in(tower.model, torch.bfloat16).eval()
    patch_transformers(model, backend="triton")
    inputs = {
        key: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in tower.inputs.items()
    }

    def step():
        tower.pick(model(**inputs)).float().sum().backward()

    return keys_of(model_call(folder, torch.bfloat16)), keys_of(step)


@pytest.mark.parametrize("name", TOWERS)
def test_transformers(name, tmp_path):
    ahead, in_use = run_compiled(ahead_and_in_use, name, tmp_path)
    assert in_use <= ahead
    assert len(ahead - in_use) <= 2  # long images, where the tower's are short: one forward kernel, or keys turned before it


def timm_keys(architecture: str, folder) -> list[str]:
    import_timm()
    (folder / "config.json").write_text(json.dumps({"architecture": architecture}))
    return sorted(name for name, _ in keys_of(model_call(folder, torch.bfloat16)))


PLAIN = [*["attention_forward_kernel"] * 2, "key_value_gradient_kernel", "query_gradient_kernel", "row_terms_kernel"]


@pytest.mark.parametrize(
    "architecture, more",
    [
        ("vit_tiny_patch16_224", []),
        ("eva02_tiny_patch14_336", ["rotate_kernel"]),
        ("vit_small_patch16_rope_mixed_224", ["rotate_kernel", "unrotate_kernel"]),  # angles are learned
        ("naflexvit_base_patch16_gap", []),
        ("gemma4_vit_167m", ["rotate_kernel"]),
    ],
)
def test_timm(architecture, more, tmp_path):
    try:
        import_timm()
    except ImportError:
        pytest.skip("timm is not installed (pip install --no-deps timm)")
    assert run_compiled(timm_keys, architecture, tmp_path) == sorted(PLAIN + more)
