#!/usr/bin/env bash
# POT: its two log-domain Sinkhorns end on different marginals, and its plain one returns a plan without mass where exp underflows.
#
# ot.bregman.sinkhorn_log scales columns and then rows, ot.batch.bregman_log_projection_batch rows and then columns. One would guess that the second is the
# first for many problems at once; after a fixed number of iterations they are different plans, one with exact rows, one with exact
# columns. (Given the transposed problem, the batch solver agrees with the other to rounding.) And ot.sinkhorn, where exp(-cost / reg) is 0
# everywhere, meets a division by zero, keeps its starting point and returns a plan of zeros: finite, of no mass, with a warning for the only sign. One
# would guess NaN, or an error.
#
# Seen: POT 0.9.7.post1, as below. Needs python3 with pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" pot==0.9.7.post1
cat > "$folder/marginals.py" <<'PY'
import warnings

import numpy as np
import ot

scores = np.random.default_rng(0).uniform(-1, 1, (6, 9))
a, b = np.ones(6), np.full(9, 6 / 9)


def error(plan):
    return f"rows {np.abs(plan.sum(1) - a).max():.2f}, columns {np.abs(plan.sum(0) - b).max():.2f}"


print("POT", ot.__version__)
plain = ot.bregman.sinkhorn_log(a, b, -scores, 0.05, numItermax=3, stopThr=0, warn=False)
batch = ot.batch.bregman_log_projection_batch(scores[None] / 0.05, a[None], b[None], max_iter=3, tol=0)["T"][0]
print("largest error of the sums after 3 iterations, sinkhorn_log:", error(plain))
print("bregman_log_projection_batch:", error(batch))
print(f"largest difference of the plans: {np.abs(plain - batch).max():.2f}")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plan = ot.sinkhorn(a, b, 3 - scores, 1e-3, numItermax=3, stopThr=0)
print(f"sinkhorn where exp(-cost / reg) is 0: finite {np.isfinite(plan).all()}, mass {plan.sum():.2f} of 6, {sorted({w.category.__name__ for w in caught})}")
PY
PYTHONPATH="$folder/site" python3 "$folder/marginals.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
POT 0.9.7.post1
largest error of the sums after 3 iterations, sinkhorn_log: rows 0.00, columns 0.29
bregman_log_projection_batch: rows 0.33, columns 0.00
largest difference of the plans: 0.29
sinkhorn where exp(-cost / reg) is 0: finite True, mass 0.00 of 6, ['RuntimeWarning', 'UserWarning']
SEEN
echo "as seen before"
