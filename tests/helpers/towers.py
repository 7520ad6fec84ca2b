"""Small random vision towers of transformers, the peers of VisionEncoder in tests."""

import torch
import transformers

GRID, PATCH = 6, 4  # the towers were "trained" on 24 x 24 pixels

SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, patch_size=PATCH)
SMALL_DINO = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, patch_size=PATCH, image_size=GRID * PATCH
)


def make_tower(name: str) -> torch.nn.Module:
    """A tower of transformers with every parameter random, those that start as zeros or ones included."""
    image = dict(image_size=GRID * PATCH)
    t = transformers
    make = {
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SMALL, **image)),
        "siglip2": lambda: t.Siglip2VisionModel(t.Siglip2VisionConfig(**SMALL, num_patches=GRID * GRID)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SMALL_DINO)),
        "dinov2_giant": lambda: t.Dinov2Model(t.Dinov2Config(**SMALL_DINO, use_swiglu_ffn=True)),
        "dinov2_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**SMALL_DINO, num_register_tokens=3)
        ),
        "aimv2": lambda: t.Aimv2VisionModel(t.Aimv2VisionConfig(**SMALL, **image)),
        "aimv2_native": lambda: t.Aimv2VisionModel(t.Aimv2VisionConfig(**SMALL, **image, is_native=True)),
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL, **image)),
    }[name]
    torch.manual_seed(1)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


TOWERS = ("siglip", "siglip2", "dinov2", "dinov2_giant", "dinov2_registers", "aimv2", "aimv2_native", "clip")
