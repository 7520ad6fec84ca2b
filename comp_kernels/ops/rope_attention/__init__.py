"""rope_attention: 2D rotary embedding fused with attention over packed sequences."""

from .api import rope_attention
from .tables import axial_freqs, rope_tables

__all__ = ["axial_freqs", "rope_attention", "rope_tables"]
