"""Small random vision towers of transformers, one per family, each with a batch of images of different sizes."""

import importlib
import importlib.util
from types import ModuleType

import torch
import transformers
from parity import Tower
from torch import Tensor
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.glm4v import modeling_glm4v
from transformers.models.kimi_k25 import modeling_kimi_k25
from transformers.models.llama4 import modeling_llama4
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl


def modeling(name: str) -> ModuleType:
    """The file of a model that an older transformers may not have."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


SIZE = dict(hidden_size=64, intermediate_size=96, patch_size=4)
BLOCKS = dict(num_hidden_layers=2, num_attention_heads=2)
IMAGES = torch.tensor([[1, 4, 6], [1, 2, 4], [1, 8, 4]])  # frames, rows, columns of patches
WITH_CLIP = torch.tensor([[1, 4, 6], [2, 2, 4], [1, 8, 4]])
QWEN = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
LATER_QWEN = QWEN | dict(hidden_size=64, intermediate_size=96)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def packed(model: torch.nn.Module, grids: Tensor = WITH_CLIP) -> Tower:
    return Tower(model, {"hidden_states": randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4), "grid_thw": grids})


def images(model: torch.nn.Module, square: bool = False) -> Tower:
    return Tower(model, {"pixel_values": randn(2, 3, 16, 16 if square else 20)})


def qwen2_vl() -> Tower:
    config = modeling_qwen2_vl.Qwen2VLVisionConfig(**QWEN, embed_dim=64, hidden_size=48)
    return packed(modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config))


def qwen2_5_vl() -> Tower:
    """One layer of windows of 2 x 2 merged patches, cut off at the borders, and one of whole images."""
    config = modeling_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        **LATER_QWEN, window_size=16, fullatt_block_indexes=[1], out_hidden_size=48
    )
    return packed(modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config))


def qwen3_vl() -> Tower:
    config = modeling_qwen3_vl.Qwen3VLVisionConfig(
        **LATER_QWEN, out_hidden_size=48, num_position_embeddings=64, deepstack_visual_indexes=[0]
    )
    return packed(modeling_qwen3_vl.Qwen3VLVisionModel(config))


def glm4v() -> Tower:
    config = modeling_glm4v.Glm4vVisionConfig(**LATER_QWEN, out_hidden_size=64, image_size=32, hidden_act="silu")
    return packed(modeling_glm4v.Glm4vVisionModel(config), IMAGES)


def kimi_k25() -> Tower:
    config = modeling_kimi_k25.Kimi_K25VisionConfig(**SIZE, **BLOCKS, pos_emb_height=8, pos_emb_width=8)
    model = modeling_kimi_k25.Kimi_K25VisionModel(config)
    return Tower(model, {"pixel_values": randn(int(IMAGES.prod(1).sum()), 3, 4, 4), "grid_thw": IMAGES})


def patches(model: torch.nn.Module, channels: int = 3, **more: Tensor) -> Tower:
    """Three packed images, as most later towers take them."""
    rows = int(IMAGES.prod(1).sum())
    return Tower(model, {"pixel_values": randn(rows, channels * 4 * 4), "grid_thw": IMAGES} | more)


def qwen2_5_omni() -> Tower:
    config = modeling("qwen2_5_omni").Qwen2_5OmniVisionEncoderConfig(
        **LATER_QWEN, window_size=16, fullatt_block_indexes=[1], out_hidden_size=48
    )
    return packed(modeling("qwen2_5_omni").Qwen2_5OmniVisionEncoder(config))


def glm_ocr() -> Tower:
    """Norms of q and k."""
    config = modeling("glm_ocr").GlmOcrVisionConfig(**LATER_QWEN, out_hidden_size=64, image_size=32, hidden_act="silu")
    return packed(modeling("glm_ocr").GlmOcrVisionModel(config), IMAGES)


def exaone4_5() -> Tower:
    """Grouped-query attention out of one projection."""
    config = modeling("exaone4_5").Exaone4_5_VisionConfig(
        **LATER_QWEN, num_key_value_heads=1, window_size=16, fullatt_block_indexes=[1], out_hidden_size=48
    )
    return packed(modeling("exaone4_5").Exaone4_5_VisionModel(config))


def glm_image() -> Tower:
    config = modeling("glm_image").GlmImageVisionConfig(**SIZE, depth=2, num_heads=2, image_size=32)
    return patches(modeling("glm_image").GlmImageVisionModel(config))


def cosmos3_edge() -> Tower:
    config = modeling("cosmos3_edge").Cosmos3EdgeVisionConfig(**SIZE, **BLOCKS, num_patches=16)
    return patches(modeling("cosmos3_edge").Cosmos3EdgeVisionModel(config))


def video_llama_3() -> Tower:
    config = modeling("video_llama_3").VideoLlama3VisionConfig(**SIZE, **BLOCKS)
    return patches(modeling("video_llama_3").VideoLlama3VisionModel(config), merge_sizes=torch.tensor([2, 1, 2]))


def minimax_m3_vl() -> Tower:
    """30 of 32 channels turn."""
    config = modeling("minimax_m3_vl").MiniMaxM3VLVisionConfig(**SIZE, **BLOCKS, image_size=32)
    return patches(modeling("minimax_m3_vl").MiniMaxM3VLVisionModel(config), channels=6)


def inkling2() -> Tower:
    """Neighbouring channels turn together; each image begins with a class token. The grids count merged patches, 2 x 2."""
    config = modeling("inkling2").Inkling2VisionConfig(**SIZE, **BLOCKS, posemb_grid_size=8, projection_hidden_dim=64)
    inputs = {"pixel_values": randn(int(IMAGES.prod(1).sum()), 8, 8, 3), "image_grid_thw": IMAGES}
    return Tower(modeling("inkling2").Inkling2VisionModel(config), inputs)


def lfm3_vl() -> Tower:
    """Norms of q and k, grouped-query attention, a convolution between two layers of attention."""
    config = modeling("lfm3_vl").Lfm3VlVisionConfig(
        **SIZE,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["attention", "conv", "attention"],
    )
    return patches(modeling("lfm3_vl").Lfm3VlVisionModel(config), channels=6)


def minicpmv4_6() -> Tower:
    """The layers, and the windows of 2 x 2 that are merged between them."""
    config = modeling("minicpmv4_6").MiniCPMV4_6VisionConfig(**SIZE, **BLOCKS, image_size=32, insert_layer_id=0)
    inputs = {"pixel_values": randn(1, 3, 4, 4 * int(IMAGES.prod(1).sum())), "target_sizes": IMAGES[:, 1:]}
    return Tower(modeling("minicpmv4_6").MiniCPMV4_6VisionModel(config), inputs, patched_modules=3)


def hunyuan_vl() -> Tower:
    config = modeling("hunyuan_vl").HunYuanVLVisionConfig(
        **SIZE, **BLOCKS, out_hidden_size=48, text_hidden_size=48, max_image_size=32
    )
    return patches(modeling("hunyuan_vl").HunYuanVLVisionTransformer(config))


def pixtral() -> Tower:
    """Two images of different sizes, packed into one row behind a mask of blocks."""
    config = transformers.PixtralVisionConfig(**SIZE, **BLOCKS, image_size=32)
    inputs = {"pixel_values": randn(2, 3, 16, 24), "image_sizes": [(16, 12), (8, 24)]}
    return Tower(transformers.PixtralVisionModel(config), inputs)


def dinov3() -> Tower:
    config = transformers.DINOv3ViTConfig(**SIZE, **BLOCKS, image_size=32, num_register_tokens=3, key_bias=True)
    return images(transformers.DINOv3ViTModel(config))


def gemma4() -> Tower:
    """Two images, the first padded; grouped-query attention."""
    config = modeling_gemma4.Gemma4VisionConfig(
        **SIZE, **BLOCKS, num_key_value_heads=1, head_dim=32, position_embedding_size=16, pooling_kernel_size=2
    )
    positions = torch.full((2, 24, 2), -1)
    for image, (rows, columns) in enumerate(((2, 4), (4, 6))):
        grid = torch.cartesian_prod(torch.arange(columns), torch.arange(rows))
        positions[image, : rows * columns] = grid
    inputs = {"pixel_values": randn(2, 24, 3 * 16).sigmoid(), "pixel_position_ids": positions}
    return Tower(modeling_gemma4.Gemma4VisionModel(config), inputs)


def llama4() -> Tower:
    config = modeling_llama4.Llama4VisionConfig(
        **SIZE | dict(intermediate_size=256),
        **BLOCKS,
        image_size=16,
        vision_output_dim=64,
        projector_input_dim=64,
        projector_output_dim=64,
    )
    return images(modeling_llama4.Llama4VisionModel(config), square=True)


def step3p7() -> Tower:
    config = modeling("step3p7").Step3p7VisionConfig(**SIZE, **BLOCKS, image_size=16)
    return images(modeling("step3p7").Step3p7VisionModel(config), square=True)


def siglip() -> Tower:
    return images(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZE, **BLOCKS, image_size=16)), square=True)


def siglip2() -> Tower:
    """NaFlex: three images of different grids, padded to the largest; padding is cut off, as its users do."""
    config = transformers.Siglip2VisionConfig(**SIZE, **BLOCKS, num_patches=16, vision_use_head=False)
    shapes = torch.tensor([[4, 5], [2, 3], [4, 4]])
    mask = torch.arange(20) < shapes.prod(1)[:, None]
    inputs = {"pixel_values": randn(3, 20, 48), "spatial_shapes": shapes, "pixel_attention_mask": mask.long()}
    return Tower(transformers.Siglip2VisionModel(config), inputs, pick=lambda output: output.last_hidden_state[mask])


def aimv2() -> Tower:
    config = transformers.Aimv2VisionConfig(**SIZE, **BLOCKS, image_size=16, use_head=False)
    return images(transformers.Aimv2VisionModel(config), square=True)


def clip() -> Tower:
    config = transformers.CLIPVisionConfig(**SIZE, **BLOCKS, image_size=16)
    return images(transformers.CLIPVisionModel(config), square=True)


def dinov2() -> Tower:
    return images(transformers.Dinov2Model(transformers.Dinov2Config(**SIZE, **BLOCKS, image_size=16, mlp_ratio=2)))


def dinov2_with_registers() -> Tower:
    config = transformers.Dinov2WithRegistersConfig(**SIZE, **BLOCKS, image_size=16, mlp_ratio=2, num_register_tokens=3)
    return images(transformers.Dinov2WithRegistersModel(config))


def radio() -> Tower:
    config = modeling("radio").RadioConfig(
        hidden_size=64, **BLOCKS, patch_size=4, image_size=16, max_img_size=32, mlp_ratio=2.0
    )
    return images(modeling("radio").RadioModel(config))


def radio_packed() -> Tower:
    """The same with images of different sizes in one row."""
    model = radio().model
    return Tower(model, {"pixel_values": randn(1, int(IMAGES.prod(1).sum()), 48), "image_grid_hw": IMAGES[:, 1:]})


def internvl() -> Tower:
    config = modeling("internvl").InternVLVisionConfig(**SIZE, **BLOCKS, image_size=16, use_qk_norm=True)
    return images(modeling("internvl").InternVLVisionModel(config), square=True)


def janus() -> Tower:
    config = modeling("janus").JanusVisionConfig(hidden_size=64, **BLOCKS, patch_size=4, image_size=16, mlp_ratio=2)
    return images(modeling("janus").JanusVisionModel(config), square=True)


EARLIER_TOWERS = (
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    glm4v,
    kimi_k25,
    pixtral,
    dinov3,
    gemma4,
    llama4,
    siglip,
    siglip2,
    aimv2,
    clip,
    dinov2,
    dinov2_with_registers,
)
LATER_TOWERS = (
    qwen2_5_omni,
    glm_ocr,
    exaone4_5,
    glm_image,
    cosmos3_edge,
    video_llama_3,
    minimax_m3_vl,
    inkling2,
    lfm3_vl,
    minicpmv4_6,
    hunyuan_vl,
    step3p7,
    radio,
    radio_packed,
    internvl,
    janus,
)
"""Not in every older transformers, or arranged differently, which patching says."""
HAS_LATER_TOWERS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
TOWERS = {build.__name__: build for build in (*EARLIER_TOWERS, *(LATER_TOWERS if HAS_LATER_TOWERS else ()))}


def installed(name: str) -> bool:
    return importlib.util.find_spec(f"transformers.models.{name}") is not None
