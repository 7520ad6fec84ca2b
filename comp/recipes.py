"""Recipes: functions that return a whole, validated run. `train.py --recipe NAME` picks one; any field can be overridden.

Sources beside the numbers:
    [P]   arXiv 2503.18931v2, Table 11 unless another place is named
    [S]   the authors' training scripts, github.com/SliMM-X/CoMP-MM at 77f8b4e
    [A]   an assumption of ours, where neither says
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

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

MIXTURES = Path(__file__).parent / "mixtures"


def mixture(name: str) -> str:
    """A list of files as the paper and its code name them; they are looked for in data/ (docs/checkpoints.md)."""
    return str(MIXTURES / f"{name}.yaml")


# --- the models of the paper ------------------------------------------------------------------------------------------------


def paper(name: str, vision: VisionConfig, language: LanguageConfig) -> Config:
    """The paper's four stages, on its mixtures; override `stages.N.data` for others."""
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
        data=[SourceConfig(path=mixture("stage1"))],  # [P] LLaVA-Pretrain, 558K
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
        data=[SourceConfig(path=mixture("stage2"))],  # [P] SynthDoG, UReader-TR, recaptioned CC3M, 118K and 558K, DenseFusion
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
        data=[SourceConfig(path=mixture("stage2"))],  # [S] the same set again
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
        data=[SourceConfig(path=mixture("stage3"))],  # [P] LLaVA-NeXT and LLaVA-OneVision single image, 3.2M
    )
    return Config(
        name=name,
        vision=vision,
        language=language,
        stages=[adapter_only, fixed, native, instruction],  # [P] one epoch each
        checkpoint=CheckpointConfig(every_steps=1000, keep=1),  # [S]
        activation_checkpointing=True,  # [S]
        balance=True,  # [A]
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


def from_comp_siglip(name: str, language: str) -> Config:
    """Starts from the released CoMP-SigLIP ([S] comp_1b_comp_siglip.sh). The tower knows native resolution and words already:
    rotary embedding is on from the first step, Stage II is one native pass, and nothing is aligned."""
    vision = VisionConfig(path="SliMM-X/CoMP-SigLIP-So400M", adapter_init="lecun")
    config = paper(name, vision, LanguageConfig(path=language))
    adapter_only, _, native, instruction = config.stages
    adapter_only.rope, adapter_only.resolution = True, None
    native.name = "II"
    instruction.optim.lr_vision = 5e-6
    config.stages = [adapter_only, native, instruction]
    for stage in config.stages:
        stage.alignment = None
    return config


def comp_siglip_so400m_qwen2_5_0_5b() -> Config:
    """CoMP-MM-1B from CoMP-SigLIP."""
    return from_comp_siglip("comp-siglip-so400m_qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct")


def comp_siglip_so400m_qwen2_5_7b() -> Config:
    """CoMP-MM-7B from CoMP-SigLIP, Table 1; [A] the schedule of the 1B script, there is none for 7B."""
    return from_comp_siglip("comp-siglip-so400m_qwen2.5-7b", "Qwen/Qwen2.5-7B")


def clip_large_qwen2_5_0_5b() -> Config:
    """CoMP with CLIP-L at 336 pixels, Table 7; the authors published no code for it."""
    return paper(
        "clip-large_qwen2.5-0.5b",
        VisionConfig(path="openai/clip-vit-large-patch14-336", pretrain_resolution=336, adapter_init="lecun"),  # init: [A]
        LanguageConfig(path="Qwen/Qwen2.5-0.5B-Instruct"),
    )


def siglip_base_qwen2_5_0_5b() -> Config:
    """CoMP with SigLIP-Base, Table 7, which does not say at which resolution."""
    return paper(
        "siglip-base_qwen2.5-0.5b",
        VisionConfig(path="google/siglip-base-patch16-384", pretrain_resolution=384, adapter_init="lecun"),  # [A]
        LanguageConfig(path="Qwen/Qwen2.5-0.5B-Instruct"),
    )


def siglip2_so400m_qwen2_5_0_5b() -> Config:
    """The same recipe from SigLIP 2 So400M; not in the paper, which has SigLIP 2 as a baseline of Table 2."""
    return paper(
        "siglip2-so400m_qwen2.5-0.5b",
        VisionConfig(path="google/siglip2-so400m-patch14-384", pretrain_resolution=384, adapter_init="lecun"),  # [A]
        LanguageConfig(path="Qwen/Qwen2.5-0.5B-Instruct"),
    )


# --- Table 2: a frozen tower, read by a new adapter and a language model ------------------------------------------------------


def frozen_tower(name: str, path: str, *, resolution: int, merge_size: int, rope: bool = False) -> Config:
    """Table 2's protocol (appendix C, Table 12). Baselines give one visual token per patch, CoMP's towers one per 2 x 2 patches
    of twice the side, so that both give 576."""
    stage = StageConfig(
        name="reading",
        trainable=("adapter", "language"),  # [P] the tower is frozen
        rope=rope,
        resolution=resolution,
        pad_to_square=True,  # [P] PadToSquare, then Resize
        max_visual_tokens=1024,  # [A] room for SigLIP's 729
        max_text_tokens=4096,  # [A]
        batch_size=128,  # [P]
        forward_visual_tokens=8192,  # [A]
        forward_text_tokens=16384,  # [A]
        optim=OptimConfig(lr_adapter=8e-5, lr_language=1e-5, warmup_ratio=0.05, min_lr_ratio=0.0),  # [P]
        data=[SourceConfig(path=mixture("llava_sft"))],  # [P] LLaVA's SFT data, one epoch, 5,197 steps
    )
    return Config(
        name=name,
        vision=VisionConfig(path=path, merge_size=merge_size, adapter_init="lecun"),  # init: [A]
        language=LanguageConfig(path="meta-llama/Meta-Llama-3-8B", position_ids="1d"),  # [P]; positions: [A]
        stages=[stage],
        activation_checkpointing=True,  # [A]
        num_workers=8,  # [A]
    )


FROZEN_TOWERS = {  # recipe: (tower, side in pixels, merge size, rotary embedding)
    "table2_clip-large": ("openai/clip-vit-large-patch14-336", 336, 1, False),
    "table2_dinov2-large": ("facebook/dinov2-large", 336, 1, False),
    "table2_siglip-large": ("google/siglip-large-patch16-384", 384, 1, False),
    "table2_siglip-so400m": ("google/siglip-so400m-patch14-384", 378, 1, False),
    "table2_siglip2-so400m": ("google/siglip2-so400m-patch16-naflex", 384, 1, False),
    "table2_aimv2-large": ("apple/aimv2-large-patch14-336", 336, 1, False),
    "table2_comp-siglip-so400m": ("SliMM-X/CoMP-SigLIP-So400M", 672, 2, True),
    "table2_comp-dinov2-large": ("SliMM-X/CoMP-DINOv2-Large", 672, 2, True),
}


RECIPES: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "smollm2": smollm2,
    "siglip-so400m_qwen2.5-0.5b": siglip_so400m_qwen2_5_0_5b,
    "dinov2-large_qwen2.5-0.5b": dinov2_large_qwen2_5_0_5b,
    "aimv2-large_qwen2.5-0.5b": aimv2_large_qwen2_5_0_5b,
    "comp-siglip-so400m_qwen2.5-0.5b": comp_siglip_so400m_qwen2_5_0_5b,
    "siglip-so400m_qwen2.5-7b": siglip_so400m_qwen2_5_7b,
    "comp-siglip-so400m_qwen2.5-7b": comp_siglip_so400m_qwen2_5_7b,
    "clip-large_qwen2.5-0.5b": clip_large_qwen2_5_0_5b,
    "siglip-base_qwen2.5-0.5b": siglip_base_qwen2_5_0_5b,
    "siglip2-so400m_qwen2.5-0.5b": siglip2_so400m_qwen2_5_0_5b,
    **{
        name: partial(frozen_tower, name, path, resolution=side, merge_size=merge, rope=rope)
        for name, (path, side, merge, rope) in FROZEN_TOWERS.items()
    },
}
