#!/usr/bin/env bash
# torch: torch.get_float32_matmul_precision() raises where a product's precision was set the new way, and no other.
#
# torch has two ways to say how precisely float32 is multiplied: torch.set_float32_matmul_precision, and since 2.9 attributes per backend, which torch
# suggests now; the two must not be mixed. One would guess that only setting can be a mistake: the getter would answer "medium" where oneDNN's
# products were set to bfloat16, as it does when "medium" itself was set, or answer "highest". It raises, and speaks of a mix that nobody made. Set back to
# "ieee", it answers again. The other way round is no error: the attributes show what the old function has set. Code that asks (a library that wants to
# warn, or to put the setting back later) has to expect the error.
#
# Seen: torch 2.13.0, any processor. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0
cat > "$folder/precision.py" <<'PY'
import torch

products = torch.backends.mkldnn.matmul
assert torch.get_float32_matmul_precision() == "highest"
products.fp32_precision = "bf16"
try:
    answer = torch.get_float32_matmul_precision()
except RuntimeError as error:
    answer = f"RuntimeError: {error}"
print("new way to bf16, then asked the old way:", answer[:160])
assert answer.startswith("RuntimeError") and "mix of the legacy and new APIs" in answer, answer
products.fp32_precision = "ieee"
assert torch.get_float32_matmul_precision() == "highest"
torch.set_float32_matmul_precision("medium")
print("old way to medium, then asked the new way:", products.fp32_precision)
assert products.fp32_precision == "bf16" and torch.get_float32_matmul_precision() == "medium"
print("torch", torch.__version__)
PY
PYTHONPATH="$folder/site" python3 -W ignore "$folder/precision.py"
