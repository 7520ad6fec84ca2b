#!/usr/bin/env bash
# OTT-JAX: max_iterations of its Sinkhorn counts whole blocks of inner_iterations (10 by default): 3 asked for are 10 run, or none.
#
# The loop runs inner_iterations between two looks at the error. One would guess that max_iterations is the most that is run; it is rounded up
# to whole blocks, so the default solver runs 10 iterations where 3 are asked for. With min_iterations equal to max_iterations, where one
# would guess that exactly so many run, it is rounded down: 9 for 10 in blocks of 3, and none at all for 3 in blocks of 10, whose "plan" has
# the mass of exp(scores / epsilon). Nothing warns. inner_iterations=max_iterations (or 1) runs what was asked for; that matters wherever a fixed
# number of iterations is compared or timed.
#
# Seen: ott-jax 0.6.0, jax 0.10.2, as below; iterations are counted by comparing the plan with a plain loop in float64. Needs python3 with pip and 600 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" ott-jax==0.6.0 jax==0.10.2
cat > "$folder/blocks.py" <<'PY'
from importlib.metadata import version

import jax.numpy as jnp
import numpy as np
from ott.geometry.geometry import Geometry
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear.sinkhorn import Sinkhorn

scores = np.random.default_rng(0).uniform(-1, 1, (6, 9)).astype(np.float32)
problem = LinearProblem(Geometry(cost_matrix=jnp.asarray(-scores), epsilon=0.05), a=jnp.ones(6), b=jnp.full(9, 6 / 9))


def iterations_of(plan):
    """How many times columns and then rows were scaled, in float64; None where no number up to 40 gives this plan."""
    u, v = np.zeros((6, 1)), np.zeros((1, 9))
    for count in range(1, 41):
        v = np.log(6 / 9) - np.log(np.exp(scores / 0.05 + u).sum(0, keepdims=True))
        u = -np.log(np.exp(scores / 0.05 + v).sum(1, keepdims=True))
        if np.abs(np.exp(scores / 0.05 + u + v) - plan).max() < 1e-4:
            return count


print("ott-jax", version("ott-jax"))
for settings in (dict(), dict(min_iterations=3), dict(inner_iterations=1), dict(inner_iterations=3, min_iterations=3)):
    plan = np.asarray(Sinkhorn(threshold=-1.0, max_iterations=3, **settings)(problem).matrix)
    print(f"max_iterations=3 {settings}: {iterations_of(plan)} iterations, sum of the plan {plan.sum():.6g}")
for settings in (dict(inner_iterations=3), dict(inner_iterations=3, min_iterations=10)):
    plan = np.asarray(Sinkhorn(threshold=-1.0, max_iterations=10, **settings)(problem).matrix)
    print(f"max_iterations=10 {settings}: {iterations_of(plan)} iterations")
PY
PYTHONPATH="$folder/site" JAX_PLATFORMS=cpu python3 -W ignore "$folder/blocks.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
ott-jax 0.6.0
max_iterations=3 {}: 10 iterations, sum of the plan 6
max_iterations=3 {'min_iterations': 3}: None iterations, sum of the plan 7.65256e+08
max_iterations=3 {'inner_iterations': 1}: 3 iterations, sum of the plan 6
max_iterations=3 {'inner_iterations': 3, 'min_iterations': 3}: 3 iterations, sum of the plan 6
max_iterations=10 {'inner_iterations': 3}: 12 iterations
max_iterations=10 {'inner_iterations': 3, 'min_iterations': 10}: 9 iterations
SEEN
echo "as seen before"
