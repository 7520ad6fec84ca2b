#!/usr/bin/env bash
# transformers: AutoTokenizer of a folder without any tokenizer file is a tokenizer without words, not an error.
#
# A copy of a model without tokenizer.json (a filter of files that forgot it, a download that broke off) has a config.json that names the model,
# and that is enough: from_pretrained returns the class of that model with an empty vocabulary. One would guess an OSError, which an empty folder
# gives. Every text becomes no token at all, without a warning, so a model trained with it learns from nothing but special tokens.
# A vocabulary that encodes a few words is worth a check after loading.
#
# Seen: transformers 5.24.0, tokenizers as it asks for, as below. Needs python3 with pip and 150 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" transformers==5.24.0
cat > "$folder/empty.py" <<'PY'
import json
import os
from importlib.metadata import version

from transformers import AutoTokenizer

print("transformers", version("transformers"))
os.makedirs("model")
try:
    AutoTokenizer.from_pretrained("model")
    raise SystemExit("an empty folder loads now")
except (OSError, ValueError) as error:
    print("empty folder:", type(error).__name__)
with open("model/config.json", "w") as file:
    json.dump({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, file)
tokenizer = AutoTokenizer.from_pretrained("model")
ids = tokenizer("What is this?")["input_ids"]
print("config.json alone:", type(tokenizer).__name__, len(tokenizer), "entries, a sentence becomes", ids)
assert ids == [], "it has words, or refuses, now"
PY
cd "$folder" && HF_HUB_OFFLINE=1 PYTHONPATH="$folder/site" python3 -W ignore empty.py 2> /dev/null
# transformers 5.24.0
# empty folder: ValueError
# config.json alone: Qwen2Tokenizer 1 entries, a sentence becomes []
