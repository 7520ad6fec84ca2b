"""alignment_loss: cross-entropy between text and vision features seen through word embeddings."""

from .api import alignment_loss
from .temperature import propose_temperature, temperature_for_entropy

__all__ = ["alignment_loss", "propose_temperature", "temperature_for_entropy"]
