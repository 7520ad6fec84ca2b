#!/usr/bin/env bash
# torch, DTensor: the gradient of F.mse_loss over a batch in shards is too large by the number of ranks; the loss itself is right where shards are even.
#
# A DTensor of shards is meant to give what one process gives, and does for l1_loss, cross_entropy, binary_cross_entropy_with_logits and for the mean of the squares
# written out; so one would guess the same of mse_loss. Its mean is taken per rank (over the elements there) and averaged over ranks, and the gradient is
# left with the first divisor alone: two ranks give twice the gradient, eight give eight times. smooth_l1_loss, huber_loss, soft_margin_loss and binary_cross_entropy
# have it too. The loss, logged and compared, is the right one; SGD takes steps that are too long, Adam hides it, and a sum of two losses is weighed
# otherwise than it says. Where the batch does not divide by the ranks the loss is off as well, and rows of the shorter shard weigh more.
# reduction="none" and mean() is right.
#
# Seen: torch 2.13.0 (and 2.14.1) with gloo on the CPU, two and three ranks, as below. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/losses.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

LOSSES = {
    "mse_loss": F.mse_loss,
    "mse_loss, none, mean()": lambda x, y: F.mse_loss(x, y, reduction="none").mean(),
    "squares written out": lambda x, y: (x - y).square().mean(),
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "soft_margin_loss": F.soft_margin_loss,
    "binary_cross_entropy": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
    "l1_loss": F.l1_loss,
    "binary_cross_entropy_with_logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()),
    "cross_entropy": lambda x, y: F.cross_entropy(x, y.softmax(1)),
}


def main(rank, ranks, file):
    dist.init_process_group("gloo", init_method=f"file://{file}{ranks}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    for rows in (2 * ranks, 2 * ranks - 1):
        torch.manual_seed(0)
        x, y = torch.randn(rows, 3), torch.randn(rows, 3)
        for name, loss in LOSSES.items():
            alone = x.clone().requires_grad_()
            expected = loss(alone, y)
            expected.backward()
            sharded = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
            found = loss(sharded, distribute_tensor(y, mesh, [Shard(0)])).full_tensor()
            found.backward()
            times = (sharded.grad.full_tensor() / alone.grad).mean(1)
            same = torch.allclose(found, expected, atol=1e-6)
            if rank == 0:
                print(f"{ranks} ranks, {rows} rows, {name}: loss {'right' if same else 'wrong'}, gradient of each row times {[round(t, 3) for t in times.tolist()]}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__.split("+")[0], flush=True)
    for ranks in (2, 3):
        mp.spawn(main, (ranks, sys.argv[1]), ranks)
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder/site" python3 -W ignore "$folder/losses.py" "$folder/meeting" 2> "$folder/messages" | tee "$folder/seen" || { cat "$folder/messages"; exit 1; }
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
2 ranks, 4 rows, mse_loss: loss right, gradient of each row times [2.0, 2.0, 2.0, 2.0]
2 ranks, 4 rows, mse_loss, none, mean(): loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0]
2 ranks, 4 rows, squares written out: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0]
2 ranks, 4 rows, smooth_l1_loss: loss right, gradient of each row times [2.0, 2.0, 2.0, 2.0]
2 ranks, 4 rows, huber_loss: loss right, gradient of each row times [2.0, 2.0, 2.0, 2.0]
2 ranks, 4 rows, soft_margin_loss: loss right, gradient of each row times [2.0, 2.0, 2.0, 2.0]
2 ranks, 4 rows, binary_cross_entropy: loss right, gradient of each row times [2.0, 2.0, 2.0, 2.0]
2 ranks, 4 rows, l1_loss: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0]
2 ranks, 4 rows, binary_cross_entropy_with_logits: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0]
2 ranks, 4 rows, cross_entropy: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0]
2 ranks, 3 rows, mse_loss: loss wrong, gradient of each row times [1.5, 1.5, 3.0]
2 ranks, 3 rows, mse_loss, none, mean(): loss right, gradient of each row times [1.0, 1.0, 1.0]
2 ranks, 3 rows, squares written out: loss right, gradient of each row times [1.0, 1.0, 1.0]
2 ranks, 3 rows, smooth_l1_loss: loss wrong, gradient of each row times [1.5, 1.5, 3.0]
2 ranks, 3 rows, huber_loss: loss wrong, gradient of each row times [1.5, 1.5, 3.0]
2 ranks, 3 rows, soft_margin_loss: loss wrong, gradient of each row times [1.5, 1.5, 3.0]
2 ranks, 3 rows, binary_cross_entropy: loss wrong, gradient of each row times [1.5, 1.5, 3.0]
2 ranks, 3 rows, l1_loss: loss right, gradient of each row times [1.0, 1.0, 1.0]
2 ranks, 3 rows, binary_cross_entropy_with_logits: loss wrong, gradient of each row times [1.0, 1.0, 1.0]
2 ranks, 3 rows, cross_entropy: loss right, gradient of each row times [1.0, 1.0, 1.0]
3 ranks, 6 rows, mse_loss: loss right, gradient of each row times [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
3 ranks, 6 rows, mse_loss, none, mean(): loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 6 rows, squares written out: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 6 rows, smooth_l1_loss: loss right, gradient of each row times [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
3 ranks, 6 rows, huber_loss: loss right, gradient of each row times [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
3 ranks, 6 rows, soft_margin_loss: loss right, gradient of each row times [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
3 ranks, 6 rows, binary_cross_entropy: loss right, gradient of each row times [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
3 ranks, 6 rows, l1_loss: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 6 rows, binary_cross_entropy_with_logits: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 6 rows, cross_entropy: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 5 rows, mse_loss: loss wrong, gradient of each row times [2.5, 2.5, 2.5, 2.5, 5.0]
3 ranks, 5 rows, mse_loss, none, mean(): loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 5 rows, squares written out: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 5 rows, smooth_l1_loss: loss wrong, gradient of each row times [2.5, 2.5, 2.5, 2.5, 5.0]
3 ranks, 5 rows, huber_loss: loss wrong, gradient of each row times [2.5, 2.5, 2.5, 2.5, 5.0]
3 ranks, 5 rows, soft_margin_loss: loss wrong, gradient of each row times [2.5, 2.5, 2.5, 2.5, 5.0]
3 ranks, 5 rows, binary_cross_entropy: loss wrong, gradient of each row times [2.5, 2.5, 2.5, 2.5, 5.0]
3 ranks, 5 rows, l1_loss: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 5 rows, binary_cross_entropy_with_logits: loss wrong, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0]
3 ranks, 5 rows, cross_entropy: loss right, gradient of each row times [1.0, 1.0, 1.0, 1.0, 1.0]
SEEN
echo "as seen before"
