"""Memory that no kernel wrote shows as NaN in every test of this folder."""

from unwritten_memory import unwritten_memory_is_nan

__all__ = ["unwritten_memory_is_nan"]
