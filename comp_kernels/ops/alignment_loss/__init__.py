"""alignment_loss: cross-entropy between text and vision features seen through word embeddings."""

from .api import alignment_loss

__all__ = ["alignment_loss"]
