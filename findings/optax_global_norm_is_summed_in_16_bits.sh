#!/usr/bin/env bash
# optax: global_norm adds the leaves of the tree in the gradients' own 16 bits: clipped bfloat16 gradients are too long, and finite float16 gradients are clipped to zero.
#
# jnp.sum of a bfloat16 array adds in float32, and jit may keep more bits than it is asked for, so one would guess that a norm over the whole model is
# rounded once, at its end. That holds for each leaf; then each leaf's share is rounded, and Python's sum() adds the shares one by one: once the total
# is 256 times a share, that share is lost. A model has hundreds of leaves, and in a dict a large "embedding" comes before all "layers", so clip_by_global_norm(1)
# leaves a norm of 1.45 below, and more with more layers; the logged norm looks calm. In float16 a norm above 256 is infinite:
# max_norm / inf is 0 and every update is exactly zero, though all gradients were finite. No NaN, so a loss scale that watches the updates does not go
# down, and training stands still. Gradients cast to float32 before clipping are right.
#
# Seen: optax 0.2.8, jax 0.10.2 on the CPU, with jit and without, as below. Needs python3.11 or newer with pip, 500 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/norms.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import optax


def gradients(dtype, scale):
    """An embedding and 48 layers of 12 leaves each."""
    random = np.random.default_rng(0)
    tree = {"embedding": random.normal(0, 0.25 * scale, (1000, 8))}
    tree["layers"] = [[random.normal(0, 0.125, 64) for _ in range(12)] for _ in range(48)]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def norm(tree):
    return sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(tree)) ** 0.5


def clip(tree):
    return optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())[0]


print("optax", optax.__version__, "jax", jax.__version__)
for dtype, scale in ((jnp.float32, 1), (jnp.bfloat16, 1), (jnp.float16, 1), (jnp.float16, 20)):
    tree = gradients(dtype, scale)
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
    print(f"{dtype.__name__}, finite {finite}: norm {norm(tree):.1f}, global_norm {float(optax.global_norm(tree)):.1f}, clipped to {norm(clip(tree)):.2f};", end=" ")
    compiled = jax.jit(clip)(tree)
    as_float32 = clip(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))
    print(f"under jit {norm(compiled):.2f}, as float32 {norm(as_float32):.2f}")
PY
JAX_PLATFORMS=cpu PYTHONPATH="$folder/site" python3 "$folder/norms.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
optax 0.2.8 jax 0.10.2
float32, finite True: norm 32.9, global_norm 32.9, clipped to 1.00; under jit 1.00, as float32 1.00
bfloat16, finite True: norm 32.9, global_norm 22.6, clipped to 1.45; under jit 1.45, as float32 1.00
float16, finite True: norm 32.9, global_norm 32.8, clipped to 1.00; under jit 1.00, as float32 1.00
float16, finite True: norm 449.1, global_norm inf, clipped to 0.00; under jit 0.00, as float32 1.00
SEEN
echo "as seen before"
