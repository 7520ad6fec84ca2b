#!/usr/bin/env bash
# jax.random: a dtype of 16 bits holds for the randomness itself: of 50,000 equal bfloat16 logits, categorical draws the first few hundred only.
#
# One would guess that numbers are drawn in float32 and rounded to the dtype asked for (torch does that). They start as a uniform number of the
# dtype's own mantissa, 128 values for bfloat16 and 1024 for float16, and what is made of it has no more. categorical adds Gumbel noise in the dtype of
# the logits and takes the largest: thousands of tokens tie, the first of them wins, so a language model that hands on its bfloat16 logits prefers tokens of low
# numbers, and a class of 0.1 % comes in 0.01 % of the draws. bernoulli with a bfloat16 p of 0.1 % gives 0.8 %. normal ends at 2.5 and -2.9 and has a mean of -0.01.
# Nothing warns; the documentation has float32's limits, near 1e-7. mode="high" helps bernoulli and rare classes and not
# the ties. Drawing in float32 (logits.astype(jnp.float32)) and rounding is right.
#
# Seen: jax 0.10.2 on the CPU, as below. Needs python3.11 or newer with pip, 500 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cat > "$folder/draws.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
key, COUNT = jax.random.key(0), 1_000_000
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
    print(f"{dtype.__name__}:")
    for mode in ("low", "high"):
        tokens = np.asarray(jax.random.categorical(key, jnp.zeros(50_000, dtype), shape=(1000,), mode=mode))
        print(f"  1000 draws of 50,000 equal logits, {mode}: largest token above 45,000: {tokens.max() > 45_000}, half of them below 1000: {np.median(tokens) < 1000}, "
              f"mean token within 10 % of the middle: {abs(tokens.mean() / 25_000 - 1) < 0.1}")
        logits = jnp.log(jnp.array([0.9, 0.099, 0.001])).astype(dtype)
        rare = (np.asarray(jax.random.categorical(key, logits, shape=(COUNT,), mode=mode)) == 2).mean()
        heads = np.asarray(jax.random.bernoulli(key, jnp.asarray(0.001, dtype), (COUNT,), mode=mode)).mean()
        print(f"  how often 0.1 % comes, {mode}: categorical {rare:.2%}, bernoulli {heads:.2%}")
    values = np.asarray(jax.random.normal(key, (COUNT,), dtype)).astype(np.float64)
    different = len(np.unique(values))
    print(f"  normal: {different if different < 5000 else 'many'} values, from {values.min():.1f} to {values.max():.1f}, mean {values.mean():.2f}")
    rounded = np.asarray(jax.random.normal(key, (COUNT,)).astype(dtype)).astype(np.float64)
    print(f"  rounded from float32: from {rounded.min():.1f} to {rounded.max():.1f}, mean {abs(rounded.mean()):.2f}")
PY
JAX_PLATFORMS=cpu PYTHONPATH="$folder/site" python3 -W ignore "$folder/draws.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
jax 0.10.2
float32:
  1000 draws of 50,000 equal logits, low: largest token above 45,000: True, half of them below 1000: False, mean token within 10 % of the middle: True
  how often 0.1 % comes, low: categorical 0.09%, bernoulli 0.10%
  1000 draws of 50,000 equal logits, high: largest token above 45,000: True, half of them below 1000: False, mean token within 10 % of the middle: True
  how often 0.1 % comes, high: categorical 0.10%, bernoulli 0.10%
  normal: many values, from -4.6 to 4.5, mean 0.00
  rounded from float32: from -4.6 to 4.5, mean 0.00
float16:
  1000 draws of 50,000 equal logits, low: largest token above 45,000: False, half of them below 1000: True, mean token within 10 % of the middle: False
  how often 0.1 % comes, low: categorical 0.07%, bernoulli 0.20%
  1000 draws of 50,000 equal logits, high: largest token above 45,000: True, half of them below 1000: False, mean token within 10 % of the middle: True
  how often 0.1 % comes, high: categorical 0.09%, bernoulli 0.10%
  normal: 1024 values, from -3.5 to 3.2, mean -0.00
  rounded from float32: from -4.6 to 4.5, mean 0.00
bfloat16:
  1000 draws of 50,000 equal logits, low: largest token above 45,000: False, half of them below 1000: True, mean token within 10 % of the middle: False
  how often 0.1 % comes, low: categorical 0.01%, bernoulli 0.77%
  1000 draws of 50,000 equal logits, high: largest token above 45,000: True, half of them below 1000: False, mean token within 10 % of the middle: False
  how often 0.1 % comes, high: categorical 0.10%, bernoulli 0.10%
  normal: 128 values, from -2.9 to 2.5, mean -0.01
  rounded from float32: from -4.7 to 4.5, mean 0.00
SEEN
echo "as seen before"
