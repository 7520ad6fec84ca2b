#!/usr/bin/env bash
# torch, scaled_dot_product_attention on the CPU: gradients of a row that is masked by large finite numbers are too large by the number of keys.
#
# A row of padding may see no key at all. Many models mask with -1e9 or the least float instead of -inf, so that the row's softmax stays defined (all weights equal,
# about), and one would guess that the two backends of the CPU agree about such a row in both directions. Forward they do. The fused one
# keeps the row's logsumexp in float32 for the backward pass and makes the weights again as exp(score - logsumexp): log(8) is lost beside 1e9, so all eight weights come
# back as 1 instead of 1/8, and the gradients of q, k and v are eight times what they should be; at -1e6 they are 3 % off. With -inf, or a mask of bools, both give zeros. A loss that leaves such
# rows out hides it (their gradient is 0 then); a mean over all tokens does not.
#
# Seen: torch 2.13.0 on the CPU, float32, as below. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/masked_row.py" <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 8, 16, requires_grad=True) for _ in range(3))


def run(backend, bias):
    mask = torch.zeros(8, 8)
    mask[3] = bias
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out, torch.autograd.grad(out[0, 0, 3].sum(), (q, k, v))


for bias in (0.0, -1e4, -1e6, -1e9, torch.finfo(torch.float32).min, float("-inf")):
    (out, grads), (expected, expected_grads) = (run(b, bias) for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
    weights, expected_weights = (g[2].sum().item() / 16 for g in (grads, expected_grads))
    same = (out - expected).abs().max().item() < 1e-5
    print(f"bias {bias:.3g}: outputs equal: {same}, weights of the row add up to {weights:.2f}, by definition {expected_weights:.2f}")
PY
PYTHONPATH="$folder/site" python3 "$folder/masked_row.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
bias 0: outputs equal: True, weights of the row add up to 1.00, by definition 1.00
bias -1e+04: outputs equal: True, weights of the row add up to 1.00, by definition 1.00
bias -1e+06: outputs equal: True, weights of the row add up to 1.03, by definition 1.00
bias -1e+09: outputs equal: True, weights of the row add up to 8.00, by definition 1.00
bias -3.4e+38: outputs equal: True, weights of the row add up to 8.00, by definition 1.00
bias -inf: outputs equal: True, weights of the row add up to 0.00, by definition 0.00
SEEN
echo "as seen before"
