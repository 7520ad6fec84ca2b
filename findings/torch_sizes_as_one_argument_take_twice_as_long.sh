#!/usr/bin/env bash
# torch: x.view(shape), x.new_empty(shape) and torch.empty(shape) take about twice as long as with the sizes one by one.
#
# A torch.Size is torch's own type, read off another tensor a moment ago, so one would guess that handing it on whole is the quick way, and that
# x.view(*shape), which unpacks it into Python integers first, costs a little more. It is the other way round: the parser of arguments reads
# integers that stand as arguments of their own faster than those within a torch.Size, a tuple or a list, by 0.7 to 2 microseconds a call. That
# is more than half of a view, and it adds up where an operator's host code allocates and views a dozen tensors.
#
# Seen: torch 2.13.0 (CPU), Python 3.11, AMD EPYC (Zen 3), [64, 128], microseconds, torch.Size / one by one: new_empty 2.7 / 1.3, view 3.6 / 1.5, reshape
# 3.0 / 1.5, expand 3.1 / 1.6, torch.empty 2.7 / 1.2. The ratio is looked at, shortest of many rounds. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/sizes.py" <<'PY'
import timeit

import torch

torch.set_num_threads(1)
x = torch.zeros(64, 128)
shape = x.shape
calls = {
    "new_empty": (lambda: x.new_empty(shape), lambda: x.new_empty(*shape)),
    "view": (lambda: x.view(shape), lambda: x.view(*shape)),
    "reshape": (lambda: x.reshape(shape), lambda: x.reshape(*shape)),
    "expand": (lambda: x.expand(shape), lambda: x.expand(*shape)),
    "torch.empty": (lambda: torch.empty(shape), lambda: torch.empty(*shape)),
}


def microseconds(call):
    return min(timeit.repeat(call, number=5000, repeat=15)) / 5000 * 1e6


print("torch", torch.__version__.split("+")[0])
for name, (whole, unpacked) in calls.items():
    one, several = microseconds(whole), microseconds(unpacked)
    print(f"{name}: torch.Size {one:.2f} us, one by one {several:.2f} us")
    assert one > 1.3 * several, "no longer so"
PY
PYTHONPATH="$folder/site" python3 "$folder/sizes.py"
