#!/usr/bin/env bash
# timm: create_optimizer_v2(layer_decay=...) leaves every layer at the full learning rate until one of timm's own schedulers is made for it.
#
# It makes a group of parameters per layer, and one would guess that a group's lr is the layer's: torch's optimisers know nothing else, and torch's schedulers keep
# the ratios of groups. The factor is put under "lr_scale", a key that only timm's schedulers multiply in. With a constant rate, one of torch's or transformers' schedulers, or
# a loop that sets lr by hand, the patch embedding learns as fast as the head: below, 8000 times as fast as asked for. Fine-tuning by the book loses what was
# pretrained, and a search over layer_decay finds that it makes no difference, which is so. A timm scheduler writes the scaled rates when it is made.
# group["lr"] *= group["lr_scale"] once, for each group, before one of torch's schedulers is made is right as well.
#
# Seen: timm 1.0.31 with torch 2.13.0, as below; its pull request 2532 was closed. Needs python3.11 or newer with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.4.6 pillow==13.0.0 pyyaml==6.0.4 safetensors==0.8.0 huggingface_hub==2.4.0
python3 -m pip install --quiet --no-deps --target "$folder/site" timm==1.0.31
cat > "$folder/layers.py" <<'PY'
import sys
from unittest.mock import MagicMock

for name in ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".utils"):
    sys.modules["torchvision" + name] = MagicMock()  # timm's loading of pictures uses it, models and optimisers do not; the wheel wants a torch with CUDA

import timm
import torch
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR

print("timm", timm.__version__, "torch", torch.__version__.split("+")[0])
NAMES = ("patch_embed.proj.weight", "blocks.5.mlp.fc1.weight", "head.weight")
SCHEDULERS = {
    "no scheduler": lambda optimizer: None,
    "torch's cosine": lambda optimizer: CosineAnnealingLR(optimizer, 100),
    "timm's cosine, no warm-up": lambda optimizer: CosineLRScheduler(optimizer, 100),
    "timm's cosine, warm-up": lambda optimizer: CosineLRScheduler(optimizer, 100, warmup_t=2, warmup_lr_init=0.1),
    "lr times lr_scale, torch's cosine": lambda optimizer: [group.update(lr=group["lr"] * group["lr_scale"]) for group in optimizer.param_groups]
    and CosineAnnealingLR(optimizer, 100),
}


def moved(scheduler):
    """How far some weights go in each of the first two epochs of one update each, with gradients of one."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.1, momentum=0, weight_decay=0, layer_decay=0.5)
    schedule = scheduler(optimizer)
    weights = dict(model.named_parameters())
    for epoch in range(2):
        before = {name: weights[name].detach().clone() for name in NAMES}
        for parameter in weights.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        yield [round((before[name] - weights[name]).mean().item(), 5) for name in NAMES]
        if isinstance(schedule, CosineLRScheduler):
            schedule.step(epoch + 1)
        elif schedule:
            schedule.step()


print("weights of", NAMES)
for name, scheduler in SCHEDULERS.items():
    print(f"{name}: epochs {list(moved(scheduler))}")
PY
HF_HUB_OFFLINE=1 PYTHONPATH="$folder/site" python3 -W ignore "$folder/layers.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
timm 1.0.31 torch 2.13.0
weights of ('patch_embed.proj.weight', 'blocks.5.mlp.fc1.weight', 'head.weight')
no scheduler: epochs [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]]
torch's cosine: epochs [[0.1, 0.1, 0.1], [0.09998, 0.09998, 0.09998]]
timm's cosine, no warm-up: epochs [[1e-05, 0.00078, 0.1], [1e-05, 0.00078, 0.09998]]
timm's cosine, warm-up: epochs [[1e-05, 0.00078, 0.1], [1e-05, 0.00078, 0.1]]
lr times lr_scale, torch's cosine: epochs [[1e-05, 0.00078, 0.1], [1e-05, 0.00078, 0.09998]]
SEEN
echo "as seen before"
