"""Recipes: functions that return a whole, validated run. `train.py --recipe NAME` picks one; any field can be overridden.

Sources beside the numbers:
    [P]   arXiv 2503.18931v2, Table 11 unless another place is named
    [S]   the authors' training scripts, github.com/SliMM-X/CoMP-MM at 77f8b4e
    [A]   an assumption of ours, where neither says
"""

from __future__ import annotations

from collections.abc import Callable

from .config import (
    AlignmentConfig,
    CheckpointConfig,
    Config,
    LanguageConfig,
    OptimConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
)
from .tiny.recipe import smollm2, tiny

# --- the models of the paper ------------------------------------------------------------------------------------------------


def paper(name: str, vision: VisionConfig, language: LanguageConfig) -> Config:
    """The paper's four stages. Data lists are not published: write data/stage{1,2,3}.yaml (docs/training.md) or override
    `stages.N.data`."""
    adapter_only = StageConfig(
        name="I",
        trainable=("adapter",),  # [P]
        rope=False,  # [P] section 3.2: rotary embedding from Stage II on
        resolution="pretrain",  # [P]; [S] uses 384 for every tower
        max_visual_tokens=1024,  # [P]
        max_text_tokens=4096,  # [S] model_max_length
        batch_size=256,  # [P] 32 x 8
        forward_visual_tokens=8192,  # [A] 32 images of 384 pixels fit an 80 GB GPU
        forward_text_tokens=16384,  # [A]
        optim=OptimConfig(
            lr_adapter=1e-3,  # [P]
            betas=(0.9, 0.999),  # [S] library default
            weight_decay=0.0,  # [S]
            warmup_ratio=0.03,  # [S]
            max_grad_norm=1.0,  # [S] library default
        ),
        alignment=AlignmentConfig(weight=0.05, epsilon=0.005, temperature=0.005),  # [P] section 3.3 and appendix C
        data=[SourceConfig(path="data/stage1.yaml")],  # [P] LLaVA-Pretrain, 558K
    )
    fixed = StageConfig(
        name="II-a",
        rope=True,  # [P]
        resolution=1024,  # [P]; 1036 after rounding to the 28-pixel grid
        max_visual_tokens=3000,  # [P]
        max_text_tokens=8000,  # [S]
        batch_size=256,  # [P] 32 x 8; [S] 16 x 2 accumulation x 8
        forward_visual_tokens=12000,  # [A]
        forward_text_tokens=24000,  # [A]
        optim=OptimConfig(lr_vision=1e-4, lr_adapter=5e-3, lr_language=2e-5),  # [P]
        alignment=AlignmentConfig(weight=0.05, epsilon=0.005, temperature=0.005),  # [P]
        data=[SourceConfig(path="data/stage2.yaml")],  # [P] SynthDoG, UReader-TR, recaptioned CC3M, 118K and 558K, DenseFusion
    )
    native = StageConfig(
        name="II-b",
        rope=True,
        resolution=None,  # [P] native
        max_visual_tokens=3000,  # [P]
        max_text_tokens=8000,  # [S]
        batch_size=256,  # [P]
        forward_visual_tokens=12000,  # [A]
        forward_text_tokens=24000,  # [A]
        optim=OptimConfig(lr_vision=1e-4, lr_adapter=5e-3, lr_language=2e-5),  # [P]
        alignment=AlignmentConfig(weight=0.05, epsilon=0.005, temperature=0.005),  # [P]
        data=[SourceConfig(path="data/stage2.yaml")],  # [S] the same set again
    )
    instruction = StageConfig(
        name="III",
        rope=True,
        resolution=None,  # [P]
        max_visual_tokens=3000,  # [P]
        max_text_tokens=4096,  # [S]
        batch_size=128,  # [P] 16 x 8
        forward_visual_tokens=12000,  # [A]
        forward_text_tokens=24000,  # [A]
        optim=OptimConfig(
            lr_vision=2e-5,  # [P]
            lr_adapter=1e-5,  # [P]; in [S] the adapter falls out of every optimiser group and stays as it was
            lr_language=1e-5,  # [P]
        ),
        alignment=None,  # [P] Eq. 11: next-token loss only
        data=[SourceConfig(path="data/stage3.yaml")],  # [P] LLaVA-NeXT and LLaVA-OneVision single image, 3.2M
    )
    return Config(
        name=name,
        vision=vision,
        language=language,
        stages=[adapter_only, fixed, native, instruction],  # [P] one epoch each
        checkpoint=CheckpointConfig(every_steps=1000, keep=1),  # [S]
        activation_checkpointing=True,  # [S]
        num_workers=8,  # [S]
    )


def siglip_so400m_qwen2_5_0_5b() -> Config:
    """CoMP-MM-1B with SigLIP-So400M, Table 1."""
    return paper(
        "siglip-so400m_qwen2.5-0.5b",
        VisionConfig(path="google/siglip-so400m-patch14-384", pretrain_resolution=384, adapter_init="lecun"),  # init: [S]
        LanguageConfig(path="Qwen/Qwen2.5-0.5B-Instruct"),
    )


def dinov2_large_qwen2_5_0_5b() -> Config:
    """CoMP-MM-1B with DINOv2-L, Table 1."""
    return paper(
        "dinov2-large_qwen2.5-0.5b",
        # 518 pixels: the tower's own; [S] pre-trains the adapter at 384. Adapter init: [S]
        VisionConfig(path="facebook/dinov2-large", pretrain_resolution=518, adapter_init="truncated"),
        LanguageConfig(path="Qwen/Qwen2.5-0.5B-Instruct"),
    )


def aimv2_large_qwen2_5_0_5b() -> Config:
    """CoMP-MM-1B with AIMv2-L at 336 pixels, Tables 1 and 7; the authors published no code for it."""
    return paper(
        "aimv2-large_qwen2.5-0.5b",
        VisionConfig(path="apple/aimv2-large-patch14-336", pretrain_resolution=336, adapter_init="lecun"),  # init: [A]
        LanguageConfig(path="Qwen/Qwen2.5-0.5B-Instruct"),
    )


def siglip_so400m_qwen2_5_7b() -> Config:
    """CoMP-MM-7B with SigLIP-So400M, Table 1. [P] gives no other hyper-parameters than those of the 1B models."""
    return paper(
        "siglip-so400m_qwen2.5-7b",
        VisionConfig(path="google/siglip-so400m-patch14-384", pretrain_resolution=384, adapter_init="lecun"),
        LanguageConfig(path="Qwen/Qwen2.5-7B"),  # [P], the base model; the 1B models take the instructed one
    )


def comp_siglip_so400m_qwen2_5_0_5b() -> Config:
    """CoMP-MM-1B that starts from the released CoMP-SigLIP ([S] comp_1b_comp_siglip.sh): the tower knows native resolution and
    words already, so rotary embedding is on from the first step, Stage II is one native pass, and nothing is aligned."""
    config = paper(
        "comp-siglip-so400m_qwen2.5-0.5b",
        VisionConfig(path="SliMM-X/CoMP-SigLIP-So400M", adapter_init="lecun"),
        LanguageConfig(path="Qwen/Qwen2.5-0.5B-Instruct"),
    )
    adapter_only, _, native, instruction = config.stages
    adapter_only.rope, adapter_only.resolution = True, None
    native.name = "II"
    instruction.optim.lr_vision = 5e-6
    config.stages = [adapter_only, native, instruction]
    for stage in config.stages:
        stage.alignment = None
    return config


RECIPES: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "smollm2": smollm2,
    "siglip-so400m_qwen2.5-0.5b": siglip_so400m_qwen2_5_0_5b,
    "dinov2-large_qwen2.5-0.5b": dinov2_large_qwen2_5_0_5b,
    "aimv2-large_qwen2.5-0.5b": aimv2_large_qwen2_5_0_5b,
    "comp-siglip-so400m_qwen2.5-0.5b": comp_siglip_so400m_qwen2_5_0_5b,
    "siglip-so400m_qwen2.5-7b": siglip_so400m_qwen2_5_7b,
}
