#!/usr/bin/env bash
# torch on the CPU: a bfloat16 linear layer takes five times as long with a number of rows that it has not seen, float32's does not.
#
# On a processor with AMX a bfloat16 product is several times as fast as in float32, so one would guess that autocast makes a training step faster. It
# does where shapes repeat. bfloat16 goes to oneDNN, which makes (and compiles) a primitive for every new shape and keeps the last 1,024; float32 goes
# to MKL, which makes none. With packed rows of varying length every batch is a new shape for every layer and both directions, and the whole
# can be slower than float32. Rounding the number of rows up to a few sizes brings the gain back.
#
# Seen: torch 2.13.0, Intel Xeon with AMX, one thread, 96 to 288 channels: 300 row counts from 2,000 up, each for the first time 1.8 ms, again 0.33 ms, one
# shape over and over 0.11 ms; in float32 0.89, 0.81, 0.57 ms. Needs an x86-64 processor with amx_bf16, python3 with pip, 1 GB; elsewhere it says so and ends.
set -euo pipefail
grep -qm1 amx_bf16 /proc/cpuinfo || { echo "no AMX here: not looked at" && exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0
cat > "$folder/rows.py" <<'PY'
import statistics
import time

import torch

torch.set_num_threads(1)
ratios = {}
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.randn(288, 96).to(dtype)
    inputs = [torch.randn(2000 + 3 * i, 96).to(dtype) for i in range(300)]

    def median_time():
        times = []
        for x in inputs:
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    torch.nn.functional.linear(inputs[0], weight)
    first, again = median_time(), median_time()
    ratios[dtype] = first / again
    print(f"{dtype}: first time {first * 1e3:.2f} ms, again {again * 1e3:.2f} ms")
print("torch", torch.__version__)
assert ratios[torch.bfloat16] > 2.5 and ratios[torch.float32] < 2, ratios
PY
PYTHONPATH="$folder/site" python3 -W ignore "$folder/rows.py"
