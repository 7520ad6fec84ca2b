#!/usr/bin/env bash
# torch on the CPU: the gradient of nn.Embedding in bfloat16 is added up in bfloat16, token by token; the 257th time a token occurs adds nothing.
#
# Sums, means, matrix products, the gradients of biases, index_select and gather of 16 bits are added up in float32 on the CPU, so one would guess the same of an
# embedding. It adds each token's gradient to a row of bfloat16, as do EmbeddingBag, table[index] (biases by relative position), index_put with accumulate, take, replicate
# padding, grid_sample and interpolate(mode="area"). A row of 256 and a summand of 1 is 256 again: padding, newlines, image placeholders
# and frequent words have their gradients cut to 256 equal summands, 2048 in float16. scale_grad_by_freq divides the cut sum by the full count.
# Rows are finite and of the right sign, and torch.nn.functional.embedding and weight.index_select(0, tokens) differ by a factor of 16 below.
# index_add has both: right for rows, cut for a vector. Under autocast weights are float32 and nothing is cut.
#
# Seen: torch 2.13.0 on the CPU, one thread, as below. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/gradients.py" <<'PY'
import torch
from torch.nn import functional as F

print("torch", torch.__version__.split("+")[0])
torch.set_num_threads(1)
TIMES = 4096
zeros = torch.zeros(TIMES, dtype=torch.long)
table, picture = torch.ones(3, 4), torch.ones(1, 1, 1, 1)
WAYS = {  # of using one element 4096 times
    "embedding": (table, lambda w: F.embedding(zeros, w)),
    "embedding, scale_grad_by_freq": (table, lambda w: F.embedding(zeros, w, scale_grad_by_freq=True)),
    "embedding_bag, sums of 4": (table, lambda w: F.embedding_bag(zeros.view(-1, 4), w, mode="sum")),
    "table[index]": (table, lambda w: w[zeros]),
    "index_select": (table, lambda w: w.index_select(0, zeros)),
    "index_select of a vector": (table[0], lambda w: w.index_select(0, zeros)),
    "gather": (table, lambda w: w.gather(0, zeros[:, None].expand(-1, 4))),
    "repeat": (table, lambda w: w.repeat(TIMES, 1)),
    "a bias, linear": (table[0], lambda w: F.linear(torch.ones(TIMES, 2, dtype=w.dtype), torch.ones(4, 2, dtype=w.dtype), w)),
    "interpolate, nearest": (picture, lambda w: F.interpolate(w, size=(64, 64), mode="nearest")),
    "interpolate, area": (picture, lambda w: F.interpolate(w, size=(64, 64), mode="area")),
    "grid_sample": (picture, lambda w: F.grid_sample(w, torch.zeros(1, 64, 64, 2, dtype=w.dtype), align_corners=False)),
    "replicate padding": (picture, lambda w: F.pad(w, (0, 63, 0, 63), mode="replicate")),
}
SUMS = {
    "index_add of rows": lambda x: torch.zeros(2, 3, dtype=x.dtype).index_add(0, zeros, x),
    "index_add of a vector": lambda x: torch.zeros(2, dtype=x.dtype).index_add(0, zeros, x[:, 0]),
    "index_put, accumulate": lambda x: torch.zeros(2, 3, dtype=x.dtype).index_put((zeros,), x, accumulate=True),
    "scatter_add": lambda x: torch.zeros(2, 3, dtype=x.dtype).scatter_add(0, zeros[:, None].expand(-1, 3), x),
    "sum": lambda x: x.sum(0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradient(start, use, dtype):
    w = start.to(dtype, copy=True).requires_grad_()
    use(w).sum().backward()
    return w.grad.flatten()[0].item()


for name, (start, use) in WAYS.items():
    print(f"gradient by {name}: {[gradient(start, use, dtype) for dtype in DTYPES]}")
for name, add in SUMS.items():
    print(f"{TIMES} ones by {name}: {[add(torch.ones(TIMES, 3, dtype=dtype)).flatten()[0].item() for dtype in DTYPES]}")
PY
PYTHONPATH="$folder/site" python3 -W ignore "$folder/gradients.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
gradient by embedding: [4096.0, 256.0, 2048.0]
gradient by embedding, scale_grad_by_freq: [1.0, 0.0625, 0.5]
gradient by embedding_bag, sums of 4: [4096.0, 256.0, 2048.0]
gradient by table[index]: [4096.0, 256.0, 2048.0]
gradient by index_select: [4096.0, 4096.0, 4096.0]
gradient by index_select of a vector: [4096.0, 256.0, 2048.0]
gradient by gather: [4096.0, 4096.0, 4096.0]
gradient by repeat: [4096.0, 4096.0, 4096.0]
gradient by a bias, linear: [4096.0, 4096.0, 4096.0]
gradient by interpolate, nearest: [4096.0, 4096.0, 4096.0]
gradient by interpolate, area: [4096.0, 256.0, 2048.0]
gradient by grid_sample: [4096.0, 256.0, 2048.0]
gradient by replicate padding: [4096.0, 256.0, 2048.0]
4096 ones by index_add of rows: [4096.0, 4096.0, 4096.0]
4096 ones by index_add of a vector: [4096.0, 256.0, 2048.0]
4096 ones by index_put, accumulate: [4096.0, 256.0, 2048.0]
4096 ones by scatter_add: [4096.0, 4096.0, 4096.0]
4096 ones by sum: [4096.0, 4096.0, 4096.0]
SEEN
echo "as seen before"
