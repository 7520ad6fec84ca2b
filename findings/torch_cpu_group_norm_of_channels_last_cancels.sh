#!/usr/bin/env bash
# torch on the CPU: GroupNorm of a tensor in channels_last takes the variance as the mean of squares less the square of the mean, and loses it where the mean is large.
#
# channels_last changes the order in memory and not the numbers, so one would guess results that are equal but for rounding, as InstanceNorm's and
# convolutions' are. Contiguous, GroupNorm takes the variance about the mean (and LayerNorm does). In channels_last it is a difference of two sums
# in float32: where the mean is 1000 standard deviations the result is off by half or more, on nearly white pages of 0 .. 255 or 16-bit
# pictures it is a hundred or a thousand times too large, since what is left of the variance may be zero. The sums run on one
# by one, too: with values between 0 and 1 and 4 million pixels nothing is large, and the result is off by half a percent, by 4 % at 16 million. Nothing is NaN.
# norm(x.contiguous()) is right.
#
# Seen: torch 2.13.0 on the CPU, one thread, as below. Needs python3 with pip, 1 GB, 2 GB of memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/norms.py" <<'PY'
import sys

import torch
from torch.nn.functional import batch_norm, group_norm, instance_norm

print("torch", torch.__version__.split("+")[0])
torch.set_num_threads(1)
torch.manual_seed(0)
small, large = torch.randn(2, 8, 64, 64), torch.rand(1, 2, 2048, 2048)
INPUTS = {  # name: tensor, and the error that GroupNorm exceeds in channels_last
    "mean 1, deviation 1": (small + 1, None),
    "mean 3000, deviation 1": (small + 3000, 0.5),
    "white of 255, one pixel in a hundred 3 darker": (255 - 3 * (torch.rand(2, 8, 64, 64) < 0.01).float(), 0.5),
    "16 bits, mean 30000, deviation 10": (small * 10 + 30000, 0.5),
    "4 million pixels between 0 and 1": (large, 0.002),
}


def error(norm, x):
    """Of what `norm` makes of x, relative to the exact result in float64."""
    exact = norm(x.double())
    return ((norm(x).double() - exact).norm() / exact.norm()).item()


for name, (x, limit) in INPUTS.items():
    last = x.contiguous(memory_format=torch.channels_last)
    wrong = error(lambda v: group_norm(v, 2), last)
    others = [error(lambda v: group_norm(v, 2), x), error(lambda v: batch_norm(v, None, None, training=True), last), error(instance_norm, last)]
    found = f"an error above {limit}: {wrong > limit}" if limit else f"an error below 0.0001: {wrong < 1e-4}"
    print(f"{name}: GroupNorm in channels_last has {found}; contiguous, and BatchNorm and InstanceNorm in channels_last, a third of that at most: "
          f"{max(others) <= max(wrong / 3, 1e-4)}")
    print(f"{name}: {wrong:.2g}, {others}", file=sys.stderr)
PY
PYTHONPATH="$folder/site" python3 "$folder/norms.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
mean 1, deviation 1: GroupNorm in channels_last has an error below 0.0001: True; contiguous, and BatchNorm and InstanceNorm in channels_last, a third of that at most: True
mean 3000, deviation 1: GroupNorm in channels_last has an error above 0.5: True; contiguous, and BatchNorm and InstanceNorm in channels_last, a third of that at most: True
white of 255, one pixel in a hundred 3 darker: GroupNorm in channels_last has an error above 0.5: True; contiguous, and BatchNorm and InstanceNorm in channels_last, a third of that at most: True
16 bits, mean 30000, deviation 10: GroupNorm in channels_last has an error above 0.5: True; contiguous, and BatchNorm and InstanceNorm in channels_last, a third of that at most: True
4 million pixels between 0 and 1: GroupNorm in channels_last has an error above 0.002: True; contiguous, and BatchNorm and InstanceNorm in channels_last, a third of that at most: True
SEEN
echo "as seen before"
