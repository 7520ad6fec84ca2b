#!/usr/bin/env bash
# torch, nn.TransformerEncoderLayer: in eval() under no_grad, a mask of floats is not added to the scores any more: whatever is not zero in it is left out.
#
# src_mask may be floats, which are added to the scores before the softmax: a bias by distance (ALiBi), a learned relative bias, -inf for what is out of
# sight. One would guess that eval() turns off dropout and nothing else. It also allows a faster path (batch_first, no gradients), and that one takes every
# element that is not zero for "masked". Masks of 0 and -inf, or -1e9, mean the same both ways, so tests with causal masks pass. A bias by distance is zero
# on the diagonal alone: each token sees only itself, the numbers are finite, and a model that trained well evaluates badly. A bias without
# any zero gives NaN. A src_key_padding_mask of floats that only weigh keys down has it too; nn.MultiheadAttention by itself and eval() with gradients do not.
# torch.backends.mha.set_fastpath_enabled(False) gives the numbers of training.
#
# Seen: torch 2.13.0 on the CPU, as below; PyTorch's issue 118628 has the NaN. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/masks.py" <<'PY'
import torch
from torch import nn

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
TOKENS, WIDTH = 6, 16
x = torch.randn(2, TOKENS, WIDTH)
layer = nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True)
alone = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
place = torch.arange(TOKENS)
distance = -0.25 * (place[:, None] - place).abs().float()
later = place[:, None] < place
lighter = torch.zeros(2, TOKENS)
lighter[:, 4:] = -1
MASKS = {
    "0 and -inf, causal": {"src_mask": torch.zeros(TOKENS, TOKENS).masked_fill(later, -torch.inf)},
    "0 and -1e9, causal": {"src_mask": torch.zeros(TOKENS, TOKENS).masked_fill(later, -1e9)},
    "bias by distance": {"src_mask": distance},
    "bias without zeros": {"src_mask": distance - 1},
    "two keys at -1": {"src_key_padding_mask": lighter},
}


def compare(a, b):
    return "NaN" if (a - b).isnan().any() else "same" if torch.allclose(a, b, atol=1e-5) else "different"


for name, mask in MASKS.items():
    trained = layer.train()(x, **mask)
    layer.eval()
    with_gradients = layer(x, **mask)
    with torch.no_grad():
        fast = layer(x, **mask)
        as_bools = layer(x, **{key: value != 0 for key, value in mask.items()})
        torch.backends.mha.set_fastpath_enabled(False)
        slow = layer(x, **mask)
        torch.backends.mha.set_fastpath_enabled(True)
    print(f"{name}: eval with gradients {compare(trained, with_gradients)}, under no_grad {compare(trained, fast)}, without the fast path {compare(trained, slow)}; "
          f"the fast path beside a mask of bools: {compare(fast, as_bools)}")

attention = [alone.train(mode)(x, x, x, attn_mask=distance)[0].detach() for mode in (True, False)]
with torch.no_grad():
    attention.append(alone(x, x, x, attn_mask=distance)[0])
    alone_first = layer(x, src_mask=distance)[:, :1]
    only_one = layer(x[:, :1])
print("MultiheadAttention, bias by distance: eval", compare(attention[0], attention[1]), "under no_grad", compare(attention[0], attention[2]))
print("the layer under no_grad, first token with the bias beside that token in a row of its own:", compare(alone_first, only_one))
PY
PYTHONPATH="$folder/site" python3 -W ignore "$folder/masks.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
0 and -inf, causal: eval with gradients same, under no_grad same, without the fast path same; the fast path beside a mask of bools: same
0 and -1e9, causal: eval with gradients same, under no_grad same, without the fast path same; the fast path beside a mask of bools: same
bias by distance: eval with gradients same, under no_grad different, without the fast path same; the fast path beside a mask of bools: same
bias without zeros: eval with gradients same, under no_grad NaN, without the fast path same; the fast path beside a mask of bools: NaN
two keys at -1: eval with gradients same, under no_grad different, without the fast path same; the fast path beside a mask of bools: same
MultiheadAttention, bias by distance: eval same under no_grad same
the layer under no_grad, first token with the bias beside that token in a row of its own: same
SEEN
echo "as seen before"
