#!/usr/bin/env bash
# transformers 5: documents packed into a row by position_ids are kept apart with use_cache=False, and see each other with the default; skipped positions cut a document.
#
# Position ids that start anew, without an attention mask, are how documents are packed in a row (DataCollatorWithFlattening makes them), and with
# eager and sdpa attention too the mask is built from them. use_cache asks for keys and values to be returned, so one would guess that the logits do not depend on it.
# But they are looked at only where no cache is made. The configs of Llama, Qwen and others say use_cache=True, so model(input_ids, position_ids=...), in
# train() as in eval(), lets each document see those before it: a loss that is too low, features of the wrong text, no warning. A mask of ones does it too.
# Gradient checkpointing turns the cache off, and with it the answers change. The other way round, with the cache off every step other than one starts
# a document, so positions that skip (to stretch a context, to give image tokens fewer positions) cut a text into pieces that do not see each other.
#
# Seen: transformers 5.24.0 with torch 2.13.0, as below. Needs python3 with pip and 1.5 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/torch" torch==2.13.0 numpy==2.2.6
python3 -m pip install --quiet --target "$folder/site" transformers==5.24.0 numpy==2.2.6
cat > "$folder/packed.py" <<'PY'
from importlib.metadata import version

import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

print("transformers", version("transformers"))
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 64, "initializer_range": 0.3}
first, second = [5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16]
batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": first}, {"input_ids": second}])
row, positions = batch["input_ids"], batch["position_ids"]
print("the collator's position_ids", positions.tolist(), "attention_mask" in batch)


@torch.no_grad()
def main(name, model):
    alone = model(torch.tensor([second]), use_cache=False).logits

    def apart(**options):
        together = model(row, position_ids=positions, **options).logits[:, len(first) :]
        return "apart" if torch.allclose(together, alone, atol=1e-4) else "mixed"

    print(f"{name}: default {apart()}, use_cache=False {apart(use_cache=False)}, "
          f"use_cache=False and a mask of ones {apart(use_cache=False, attention_mask=torch.ones_like(row))}")
    skipping = torch.tensor([[0, 1, 2, 3, 20, 21, 22]])
    whole, other = (model(torch.tensor([[start, *first[1:]]]), position_ids=skipping, use_cache=False).logits[:, 4:] for start in (first[0], 30))
    cached = [model(torch.tensor([[start, *first[1:]]]), position_ids=skipping).logits[:, 4:] for start in (first[0], 30)]
    print(f"{name}: positions {skipping[0].tolist()}: the last three tokens depend on the first: default {not torch.equal(*cached)}, use_cache=False {not torch.equal(whole, other)}")


for config, cls in ((LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)):
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = cls(config(**SIZES, attn_implementation=attention))
        for training in (False, True):
            main(f"{cls.__name__}, {attention}, {'train' if training else 'eval'}", model.train(training))
PY
HF_HUB_OFFLINE=1 PYTHONPATH="$folder/site:$folder/torch" python3 -W ignore "$folder/packed.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
transformers 5.24.0
the collator's position_ids [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]] False
LlamaForCausalLM, eager, eval: default mixed, use_cache=False apart, use_cache=False and a mask of ones mixed
LlamaForCausalLM, eager, eval: positions [0, 1, 2, 3, 20, 21, 22]: the last three tokens depend on the first: default True, use_cache=False False
LlamaForCausalLM, eager, train: default mixed, use_cache=False apart, use_cache=False and a mask of ones mixed
LlamaForCausalLM, eager, train: positions [0, 1, 2, 3, 20, 21, 22]: the last three tokens depend on the first: default True, use_cache=False False
LlamaForCausalLM, sdpa, eval: default mixed, use_cache=False apart, use_cache=False and a mask of ones mixed
LlamaForCausalLM, sdpa, eval: positions [0, 1, 2, 3, 20, 21, 22]: the last three tokens depend on the first: default True, use_cache=False False
LlamaForCausalLM, sdpa, train: default mixed, use_cache=False apart, use_cache=False and a mask of ones mixed
LlamaForCausalLM, sdpa, train: positions [0, 1, 2, 3, 20, 21, 22]: the last three tokens depend on the first: default True, use_cache=False False
Qwen3ForCausalLM, eager, eval: default mixed, use_cache=False apart, use_cache=False and a mask of ones mixed
Qwen3ForCausalLM, eager, eval: positions [0, 1, 2, 3, 20, 21, 22]: the last three tokens depend on the first: default True, use_cache=False False
Qwen3ForCausalLM, eager, train: default mixed, use_cache=False apart, use_cache=False and a mask of ones mixed
Qwen3ForCausalLM, eager, train: positions [0, 1, 2, 3, 20, 21, 22]: the last three tokens depend on the first: default True, use_cache=False False
Qwen3ForCausalLM, sdpa, eval: default mixed, use_cache=False apart, use_cache=False and a mask of ones mixed
Qwen3ForCausalLM, sdpa, eval: positions [0, 1, 2, 3, 20, 21, 22]: the last three tokens depend on the first: default True, use_cache=False False
Qwen3ForCausalLM, sdpa, train: default mixed, use_cache=False apart, use_cache=False and a mask of ones mixed
Qwen3ForCausalLM, sdpa, train: positions [0, 1, 2, 3, 20, 21, 22]: the last three tokens depend on the first: default True, use_cache=False False
SEEN
echo "as seen before"
