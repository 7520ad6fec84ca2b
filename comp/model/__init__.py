"""The model: vision encoder, adapter, and the multimodal model that joins them to a language model."""

from .adapter import Adapter
from .multimodal import CoMP, CoMPOutput, StepText
from .vision_encoder import VisionEncoder
from .vit_config import ViTConfig

__all__ = ["Adapter", "CoMP", "CoMPOutput", "StepText", "VisionEncoder", "ViTConfig"]
