"""Numbers of rows that repeat: in bfloat16 on a CPU, packed tokens are filled up with zeros to one of a few sizes.

There torch multiplies by oneDNN, which makes a primitive for every shape that it has not seen: 1 to 2 ms for a layer that takes
a few tenths, in both directions, and every batch packs another number of tokens (docs/training.md). Attention ends before the
zeros, and whoever puts them behind tokens takes them off again, so nothing depends on them and their gradients are zero. In
float32 and on GPUs there are none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_STEP = 16
STEPS_PER_OCTAVE = 16


def filled_up(num_rows: int) -> int:
    """The next of 0, 16, 32 ... 512, 544 ... 1024, 1088 ...: steps of 16, above 512 16 steps to the next power of two."""
    octave = 1 << max(num_rows - 1, 0).bit_length()
    step = max(SMALLEST_STEP, octave // (2 * STEPS_PER_OCTAVE))
    return -(-num_rows // step) * step


def slack_rows(num_rows: int, device: torch.device) -> int:
    """How many rows of zeros to put behind so many before linear layers take them; 0 where that does not pay."""
    if device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_autocast_enabled("cpu"):
        return 0
    return filled_up(num_rows) - num_rows if torch.get_autocast_dtype("cpu") == torch.bfloat16 else 0


def with_slack(x: Tensor, slack: int, dim: int = 0) -> Tensor:
    """`x` with `slack` rows of zeros behind those along `dim`."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim % x.dim()) + (0, slack)) if slack else x


def without_slack(x: Tensor, slack: int, dim: int = 0) -> Tensor:
    """`x` without its last `slack` rows along `dim`."""
    return x.narrow(dim, 0, x.shape[dim] - slack) if slack else x


def over_filled_rows(function: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
    """`function`, which takes each row along `dim` by itself, of `x` and what slack pays for it."""
    slack = slack_rows(x.shape[dim], x.device)
    return without_slack(function(with_slack(x, slack, dim)), slack, dim)
