#!/usr/bin/env bash
# torch on the CPU: gradients of a LayerNorm's weight and bias, and of embeddings, are added up in bfloat16 and stop growing at 256.
#
# Every other sum of torch over bfloat16 is in float32 until it is done: sum, cumsum, products, the bias of a Linear or a GroupNorm, index_select.
# So one would guess the same of a LayerNorm over all tokens, the more so under autocast, where its parameters and their gradients are
# float32. But the rows are added one by one to a bfloat16 (one for each thread), where 256 + 1 is 256: 10000 rows of ones give 256.
# Where gradients have both signs nothing looks wrong, and a tenth of the sum below is noise. Rows that are taken more than once with
# F.embedding or x[ids] have it too; float16 stops at 2048. norm(x.float()).to(x.dtype) is right, and so is torch.compile.
#
# Seen: torch 2.13.0 on the CPU (x86-64), one thread, as below. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/sums.py" <<'PY'
import torch
from torch import nn
from torch.nn.functional import embedding

print("torch", torch.__version__.split("+")[0])
torch.set_num_threads(1)
torch.manual_seed(0)
ROWS, WIDTH = 10000, 64
x = torch.randn(ROWS, WIDTH)
ids = torch.zeros(ROWS, dtype=torch.long)


def gradient(parameter, y, grad):
    return torch.autograd.grad(y, parameter, grad.to(y.dtype))[0].flatten()


for dtype in (torch.bfloat16, torch.float16):
    rows, ones = x.to(dtype), torch.ones(ROWS, WIDTH)
    table = torch.zeros(2, WIDTH, dtype=dtype, requires_grad=True)
    modules = {"LayerNorm": nn.LayerNorm(WIDTH), "GroupNorm": nn.GroupNorm(1, WIDTH), "Linear": nn.Linear(WIDTH, WIDTH)}
    sums = {f"{name}'s bias": gradient(m.bias, m(rows), ones) for name, m in modules.items() if m.to(dtype)}
    mixed = nn.LayerNorm(WIDTH)
    sums["LayerNorm's bias in float32"] = gradient(mixed.bias, mixed(rows), ones)
    takes = {"embedding": embedding(ids, table), "table[ids]": table[ids], "index_select": table.index_select(0, ids)}
    sums.update((name, gradient(table, taken, ones)) for name, taken in takes.items())
    print(f"{dtype}, {ROWS} rows of ones:", ", ".join(f"{name} {value[0].item():.0f}" for name, value in sums.items()))

norm = nn.LayerNorm(WIDTH)
rows, grad = x.bfloat16(), (torch.randn(ROWS, WIDTH) + 0.05).bfloat16()
expected = grad.double().sum(0)
for name, y in (("as it is", norm(rows)), ("through float32", norm(rows.float()).bfloat16())):
    error = (gradient(norm.bias, y, grad).double() - expected).norm() / expected.norm()
    print(f"gradients of mean 0.05 and deviation 1, {name}: relative error of the bias's gradient above 5 %: {error.item() > 0.05}")
PY
PYTHONPATH="$folder/site" python3 "$folder/sums.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
torch.bfloat16, 10000 rows of ones: LayerNorm's bias 256, GroupNorm's bias 9984, Linear's bias 9984, LayerNorm's bias in float32 256, embedding 256, table[ids] 256, index_select 9984
torch.float16, 10000 rows of ones: LayerNorm's bias 2048, GroupNorm's bias 10000, Linear's bias 10000, LayerNorm's bias in float32 2048, embedding 2048, table[ids] 2048, index_select 10000
gradients of mean 0.05 and deviation 1, as it is: relative error of the bias's gradient above 5 %: True
gradients of mean 0.05 and deviation 1, through float32: relative error of the bias's gradient above 5 %: False
SEEN
echo "as seen before"
