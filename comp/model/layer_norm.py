"""LayerNorm whose weight and bias get whole gradients from 16-bit activations on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, by way of float32 where torch would add up the gradients of weight and bias in 16 bits
    (findings/torch_cpu_bfloat16_layer_norm_gradients_stop_at_256.sh)."""

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if not learns or x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)
