"""The definitions of the operators in plain PyTorch, any dtype, float64 included; no argument checks."""

from .ops.alignment_loss.reference import alignment_loss
from .ops.rope_attention.reference import rope_attention
from .ops.sinkhorn.reference import sinkhorn

__all__ = ["alignment_loss", "rope_attention", "sinkhorn"]
