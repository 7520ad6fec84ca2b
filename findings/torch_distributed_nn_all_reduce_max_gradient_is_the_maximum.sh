#!/usr/bin/env bash
# torch.distributed.nn: the gradient of all_reduce with MAX, MIN or PRODUCT is the maximum, minimum or product of the ranks' gradients, sent to every rank.
#
# all_reduce there takes any ReduceOp and has a gradient, as torch.amax has; one would guess that MAX sends the gradient to the rank whose element was
# the largest, as max over one tensor does, or refuses. The backward pass repeats the reduction of the forward pass on the gradients: right for SUM and AVG,
# and without meaning for the others. A softmax over classes spread over ranks, which subtracts the maximum, is saved by chance if all gradients
# through the maximum cancel; features pooled by maximum over ranks (views, chunks of a volume) train all ranks as if each had won,
# with the largest of the gradients, signs included. Shapes fit, nothing warns. torch.distributed.nn.reduce is alike.
# all_gather from the same module and amax over its result is right.
#
# Seen: torch 2.13.0 (and 2.14.1) with gloo on the CPU, as below. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/reduce.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as nn_dist
import torch.multiprocessing as mp
from torch.distributed import ReduceOp

X = torch.tensor([[1.0, 5.0], [2.0, 3.0], [4.0, 1.0]])  # a row for each of three ranks
WEIGHTS = torch.tensor([[1.0, -1.0], [10.0, -10.0], [100.0, -100.0]])  # of each rank's share of the loss
OPS = {
    "SUM": (ReduceOp.SUM, lambda x: x.sum(0)),
    "AVG": (ReduceOp.AVG, lambda x: x.mean(0)),
    "MAX": (ReduceOp.MAX, lambda x: x.amax(0)),
    "MIN": (ReduceOp.MIN, lambda x: x.amin(0)),
    "PRODUCT": (ReduceOp.PRODUCT, lambda x: x.prod(0)),
}


def main(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    for name, (op, alone) in OPS.items():
        whole = X.clone().requires_grad_()
        (alone(whole) * WEIGHTS).sum().backward()
        for way in ("all_reduce", "all_gather"):
            x = X[rank].clone().requires_grad_()
            y = nn_dist.all_reduce(x.clone(), op=op) if way == "all_reduce" else alone(torch.stack(nn_dist.all_gather(x)))
            (y * WEIGHTS[rank]).sum().backward()
            gradients = [torch.empty(2) for _ in range(3)]
            dist.all_gather(gradients, x.grad)
            if rank == 0:
                found = torch.stack(gradients)
                print(f"{name} by {way}: result {[round(v, 3) for v in y.tolist()]}, gradients {[[round(v, 3) for v in row] for row in found.tolist()]}; "
                      f"those of one process: {torch.allclose(found, whole.grad, rtol=1e-4)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__.split("+")[0], flush=True)
    mp.spawn(main, (sys.argv[1],), 3)
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder/site" python3 -W ignore "$folder/reduce.py" "$folder/meeting" 2> "$folder/messages" | tee "$folder/seen" || { cat "$folder/messages"; exit 1; }
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
SUM by all_reduce: result [7.0, 9.0], gradients [[111.0, -111.0], [111.0, -111.0], [111.0, -111.0]]; those of one process: True
SUM by all_gather: result [7.0, 9.0], gradients [[111.0, -111.0], [111.0, -111.0], [111.0, -111.0]]; those of one process: True
AVG by all_reduce: result [2.333, 3.0], gradients [[37.0, -37.0], [37.0, -37.0], [37.0, -37.0]]; those of one process: True
AVG by all_gather: result [2.333, 3.0], gradients [[37.0, -37.0], [37.0, -37.0], [37.0, -37.0]]; those of one process: True
MAX by all_reduce: result [4.0, 5.0], gradients [[100.0, -1.0], [100.0, -1.0], [100.0, -1.0]]; those of one process: False
MAX by all_gather: result [4.0, 5.0], gradients [[0.0, -111.0], [0.0, 0.0], [111.0, 0.0]]; those of one process: True
MIN by all_reduce: result [1.0, 1.0], gradients [[1.0, -100.0], [1.0, -100.0], [1.0, -100.0]]; those of one process: False
MIN by all_gather: result [1.0, 1.0], gradients [[111.0, 0.0], [0.0, 0.0], [0.0, -111.0]]; those of one process: True
PRODUCT by all_reduce: result [8.0, 15.0], gradients [[1000.0, -1000.0], [1000.0, -1000.0], [1000.0, -1000.0]]; those of one process: False
PRODUCT by all_gather: result [8.0, 15.0], gradients [[888.0, -333.0], [444.0, -555.0], [222.0, -1665.0]]; those of one process: True
SEEN
echo "as seen before"
