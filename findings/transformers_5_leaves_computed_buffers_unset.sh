#!/usr/bin/env bash
# transformers 5: after from_pretrained, a buffer that __init__ computed and that is not stored holds what lay in memory; a plain tensor attribute has no values.
#
# register_buffer(..., persistent=False) is for what can be computed again: rotary tables, position ids, masks, means of pixels. __init__ computes it, and in
# transformers 4 that was all. So one would guess that a model of one's own, or the remote code of a checkpoint, loads as it was saved. In
# transformers 5 __init__ runs on the device "meta", always; afterwards such a buffer is given memory and no values, unless the model's _init_weights computes it
# once more, as those of transformers itself do. Nothing warns, no key is missing, and the numbers may differ from run to run, or be zeros. A tensor that is a plain
# attribute stays on "meta". Constructed without from_pretrained, the same model is right.
#
# Seen: transformers 4.57.6 and 5.24.0 with torch 2.13.0, as below. Needs python3 with pip and 1.5 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/torch" torch==2.13.0 numpy==2.2.6
cat > "$folder/buffers.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from transformers import PretrainedConfig, PreTrainedModel


class Config(PretrainedConfig):
    model_type = "ours"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(2, 2)
        self.register_buffer("stored", torch.arange(1.0, 1001))
        self.register_buffer("computed", torch.arange(1.0, 1001), persistent=False)
        self.attribute = torch.arange(1.0, 1001)
        self.post_init()


class WithInit(Model):
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            module.computed.copy_(torch.arange(1.0, 1001))


def right(tensor):
    return "no values" if tensor.is_meta else "right" if torch.equal(tensor, torch.arange(1.0, 1001)) else "wrong"


def state(model):
    return ", ".join(f"{name} {right(getattr(model, name))}" for name in ("stored", "computed", "attribute"))


if sys.argv[1] == "save":  # a process of its own: what it computed must not lie in the memory of the one that loads
    print("transformers", version("transformers"))
    print("  constructed:", state(Model(Config())))
    Model(Config()).save_pretrained("model")
else:
    for kind in (Model, WithInit):
        model, report = kind.from_pretrained("model", output_loading_info=True)
        print(f"  {kind.__name__}.from_pretrained:", state(model), "| missing:", len(report["missing_keys"]))
PY
cd "$folder"
for version in 4.57.6 5.24.0; do
  python3 -m pip install --quiet --target "$folder/$version" "transformers==$version" numpy==2.2.6
  for step in save load; do
    HF_HUB_OFFLINE=1 PYTHONPATH="$folder/$version:$folder/torch" python3 -W ignore buffers.py "$step" 2> /dev/null | tee -a seen
  done
done
diff seen - <<'SEEN'
transformers 4.57.6
  constructed: stored right, computed right, attribute right
  Model.from_pretrained: stored right, computed right, attribute right | missing: 0
  WithInit.from_pretrained: stored right, computed right, attribute right | missing: 0
transformers 5.24.0
  constructed: stored right, computed right, attribute right
  Model.from_pretrained: stored right, computed wrong, attribute no values | missing: 0
  WithInit.from_pretrained: stored right, computed right, attribute no values | missing: 0
SEEN
echo "as seen before"
