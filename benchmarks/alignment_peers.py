"""What a user could pick instead of alignment_loss, beside the plain version: Liger's fused linear distillation.

Liger (`pip install liger-kernel`) has no Sinkhorn target and no prior. With the divergence of softmax(text scores) from
softmax(vision scores) it gives the gradient of mode "softmax" with one temperature, in chunks of rows. Normalised vectors are
handed to it, which is not timed, and it takes the gradient of the prototypes along, for which it has no switch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LIGER_CHUNK = 1024  # rows, its default


def liger(vision: Tensor, text: Tensor, prototypes: Tensor, temperature: float) -> Callable[[], Tensor] | None:
    """A function that returns the gradient of the normalised vision features; None where Liger is not installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return None
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=temperature, chunk_size=LIGER_CHUNK
    )
    vision, text, prototypes = (F.normalize(x.detach(), dim=-1) for x in (vision, text, prototypes))
    vision.requires_grad_()
    labels = torch.zeros(len(vision), dtype=torch.int64, device=vision.device)

    def gradient() -> Tensor:
        return torch.autograd.grad(loss(vision, prototypes, text, prototypes, labels), vision)[0]

    return gradient
