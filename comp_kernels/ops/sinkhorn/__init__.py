"""sinkhorn: batched entropic optimal transport in the log domain."""

from .api import sinkhorn

__all__ = ["sinkhorn"]
