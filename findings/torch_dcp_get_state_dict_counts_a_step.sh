#!/usr/bin/env bash
# torch.distributed.checkpoint: get_state_dict before the first update leaves the optimizer as if it had made one; the first real update is a quarter smaller.
#
# A saved start, a template to load into, a check of names: get_state_dict and get_optimizer_state_dict read as getters, and one would guess that
# training goes on as it would have without them. An optimizer that has no state yet is given one by an update with gradients of zero and a learning rate of zero,
# which leaves the weights alone and is counted: step is 1 with moments of zero. Adam's correction for young moments is then the second
# step's. Adam's weight_decay (not AdamW's) has put a share of the weights into its moments already, as if they were gradients. A checkpoint made
# there carries the same. Where one parameter has a gradient already, nothing of this happens.
# Setting every "step" to zero (and the moments of Adam) before training goes on repairs it.
#
# Seen: torch 2.13.0, one process without a process group, as below; PyTorch's issue 164929. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/getter.py" <<'PY'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict
from torch.optim import SGD, Adam, AdamW

print("torch", torch.__version__.split("+")[0])


def trained(make, getter, updates=3):
    """How far the weight, 1 at first, has gone after each update by a gradient of one, and the optimizer's state before the first."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = make(model.parameters())
    if getter is not None:
        getter(model, optimizer)
    state = {name: round(value.item(), 6) for name, value in optimizer.state[model.weight].items() if isinstance(value, torch.Tensor)}
    gone = []
    for _ in range(updates):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        gone.append(round(1 - model.weight.item(), 4))
    return gone, state


OPTIMIZERS = {
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.0),
    "Adam": lambda p: Adam(p, lr=0.1),
    "Adam, weight_decay 0.1": lambda p: Adam(p, lr=0.1, weight_decay=0.1),
    "SGD with momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
}
for name, make in OPTIMIZERS.items():
    for getter in (None, get_state_dict, get_optimizer_state_dict):
        gone, state = trained(make, getter)
        print(f"{name}, {'nothing' if getter is None else getter.__name__} before: state {state}, the weight goes {gone}")
PY
PYTHONPATH="$folder/site" python3 -W ignore "$folder/getter.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
AdamW, nothing before: state {}, the weight goes [0.1, 0.2, 0.3]
AdamW, get_state_dict before: state {'step': 1.0, 'exp_avg': 0.0, 'exp_avg_sq': 0.0}, the weight goes [0.0744, 0.1603, 0.2512]
AdamW, get_optimizer_state_dict before: state {'step': 1.0, 'exp_avg': 0.0, 'exp_avg_sq': 0.0}, the weight goes [0.0744, 0.1603, 0.2512]
Adam, nothing before: state {}, the weight goes [0.1, 0.2, 0.3]
Adam, get_state_dict before: state {'step': 1.0, 'exp_avg': 0.0, 'exp_avg_sq': 0.0}, the weight goes [0.0744, 0.1603, 0.2512]
Adam, get_optimizer_state_dict before: state {'step': 1.0, 'exp_avg': 0.0, 'exp_avg_sq': 0.0}, the weight goes [0.0744, 0.1603, 0.2512]
Adam, weight_decay 0.1, nothing before: state {}, the weight goes [0.1, 0.2, 0.2999]
Adam, weight_decay 0.1, get_state_dict before: state {'step': 1.0, 'exp_avg': 0.01, 'exp_avg_sq': 1e-05}, the weight goes [0.0802, 0.1692, 0.2622]
Adam, weight_decay 0.1, get_optimizer_state_dict before: state {'step': 1.0, 'exp_avg': 0.01, 'exp_avg_sq': 1e-05}, the weight goes [0.0802, 0.1692, 0.2622]
SGD with momentum, nothing before: state {}, the weight goes [0.1, 0.29, 0.561]
SGD with momentum, get_state_dict before: state {'momentum_buffer': 0.0}, the weight goes [0.1, 0.29, 0.561]
SGD with momentum, get_optimizer_state_dict before: state {'momentum_buffer': 0.0}, the weight goes [0.1, 0.29, 0.561]
SEEN
echo "as seen before"
