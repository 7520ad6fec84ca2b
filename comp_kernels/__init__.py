"""Fused kernels for vision transformers at native resolution and for alignment with word embeddings.

rope_attention    2D rotary embedding fused with attention over packed, variable-length sequences
sinkhorn          batched optimal-transport codes in the log domain
alignment_loss    cross-entropy between text and vision features over a vocabulary, nothing of size [batch, vocabulary] kept
"""

from . import layers, reference
from ._backends import available_backends
from .ops.alignment_loss import alignment_loss, propose_temperature, temperature_for_entropy
from .ops.rope_attention import axial_freqs, rope_attention, rope_tables
from .ops.sinkhorn import sinkhorn

__version__ = "0.1.0"
__all__ = [
    "alignment_loss",
    "available_backends",
    "axial_freqs",
    "layers",
    "propose_temperature",
    "reference",
    "rope_attention",
    "rope_tables",
    "sinkhorn",
    "temperature_for_entropy",
]
