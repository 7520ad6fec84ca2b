"""The model: vision encoder, adapter, and the multimodal model that joins them to a language model."""

from .adapter import Adapter
from .comp import CoMP, CoMPOutput
from .vision_encoder import VisionEncoder
from .vit_config import ViTConfig

__all__ = ["Adapter", "CoMP", "CoMPOutput", "VisionEncoder", "ViTConfig"]
