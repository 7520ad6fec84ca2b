#!/usr/bin/env bash
# torch on the CPU: SGD with fused=True never changes bfloat16 and float16 weights; only the last few elements of a tensor, less than a vector of them, move.
#
# fused=True is the same update in one kernel; so it is in float32, and for AdamW and Adagrad in 16 bits too. One would guess a speed-up, or an error
# where a dtype is not supported. SGD's kernel works through 16-bit tensors in vectors of 16 elements: it computes their update and
# does not store the new weights. What is left over behind the last whole vector is updated by plain code. So a small bias learns and the
# matrix beside it stays as it was drawn; nothing warns, and the loss goes down by what the leftovers can do. Weights in float32 under
# autocast are updated as they should be.
#
# Seen: torch 2.13.0 on the CPU (x86-64), as below; PyTorch's issue 191763. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/fused.py" <<'PY'
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW

print("torch", torch.__version__.split("+")[0])
KINDS = {"SGD": SGD, "AdamW": AdamW, "Adagrad": Adagrad}


def unchanged(cls, dtype, size, **way):
    """How many of `size` weights are as before after three updates by gradients of one."""
    weight = nn.Parameter(torch.ones(size, dtype=dtype))
    optimizer = cls([weight], lr=0.125, **way)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return int((weight == 1).sum())


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for name, cls in KINDS.items():
        counts = [[unchanged(cls, dtype, n, **way) for n in (7, 64, 4096 + 7)] for way in ({"foreach": False}, {"fused": True})]
        print(f"{dtype} {name}: unchanged of 7, 64 and 4103 weights: {counts[0]}, fused {counts[1]}")


def loss(model, x, target):
    return (model(x) - target).float().square().mean()


for way in ({}, {"fused": True}):
    torch.manual_seed(0)
    x, model = torch.randn(256, 64).bfloat16(), nn.Linear(64, 4).bfloat16()
    target = x @ torch.randn(64, 4).bfloat16() + 1
    first = loss(model, x, target).item()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = SGD(model.parameters(), lr=0.5, **way)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model, x, target).backward()
        optimizer.step()
    moved = {name: not torch.equal(value, before[name]) for name, value in model.named_parameters()}
    print(f"a linear layer in bfloat16, SGD {way}: changed by training: {moved}, loss below a tenth: {loss(model, x, target).item() < first / 10}")
PY
PYTHONPATH="$folder/site" python3 "$folder/fused.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
torch.float32 SGD: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 0, 0]
torch.float32 AdamW: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 0, 0]
torch.float32 Adagrad: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 0, 0]
torch.bfloat16 SGD: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 64, 4096]
torch.bfloat16 AdamW: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 0, 0]
torch.bfloat16 Adagrad: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 0, 0]
torch.float16 SGD: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 64, 4096]
torch.float16 AdamW: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 0, 0]
torch.float16 Adagrad: unchanged of 7, 64 and 4103 weights: [0, 0, 0], fused [0, 0, 0]
a linear layer in bfloat16, SGD {}: changed by training: {'weight': True, 'bias': True}, loss below a tenth: True
a linear layer in bfloat16, SGD {'fused': True}: changed by training: {'weight': False, 'bias': True}, loss below a tenth: False
SEEN
echo "as seen before"
