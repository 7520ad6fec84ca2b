"""Continual multimodal pre-training of vision encoders (CoMP, arXiv 2503.18931) on fused kernels."""

from .model import CoMP, VisionEncoder

__all__ = ["CoMP", "VisionEncoder"]
