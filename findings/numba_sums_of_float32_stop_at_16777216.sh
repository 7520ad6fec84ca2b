#!/usr/bin/env bash
# numba: np.sum and np.mean of float32 run on one by one in float32 inside @njit: the mean of 33 million ones is 0.5.
#
# numba is documented to run NumPy's functions, and its result here is a float64, so one would guess NumPy's sum (in pairs, hardly an error) or one in
# float64. The total is a float32 to which each element is added, and is turned into float64 at the end. With the total 16777216 times the summand
# nothing is added any more: the share of ones in a mask of a volume of 512 x 512 x 512 comes out as an eighth of what it is, mean brightness of a picture of
# 16 million pixels is off by 0.01 %, with an error that grows. a.sum(), sums over an axis, nansum and cumsum are alike; with parallel=True each thread has its own total, so the
# result depends on their number. var, std, nanmean and np.dot are right. A loop with total = 0.0 is exact, with total = np.float32(0) not; np.sum(a, dtype=np.float64) is right.
#
# Seen: numba 0.68.1, NumPy 2.4.6, as below; numba's issue 2855. Needs python3.11 or newer with pip, 1 GB of memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" numba==0.68.1 numpy==2.4.6
cat > "$folder/sums.py" <<'PY'
import numba
import numpy as np
from numba import njit, prange

print("numba", numba.__version__, "NumPy", np.__version__)
numba.set_num_threads(1)
ones = np.ones(2**25, np.float32)


def loop(a):
    total = 0.0
    for x in a:
        total += x
    return total


def parallel(a):
    total = np.float32(0)
    for i in prange(a.size):
        total += a[i]
    return total


WAYS = {
    "np.sum": lambda a: np.sum(a),
    "np.sum, dtype=float64": lambda a: np.sum(a, dtype=np.float64),
    "a.sum()": lambda a: a.sum(),
    "np.sum over an axis": lambda a: np.sum(a.reshape(-1, 1), 0)[0],
    "np.nansum": lambda a: np.nansum(a),
    "np.dot": lambda a: np.dot(a, a),
    "np.mean": lambda a: np.mean(a),
    "np.nanmean": lambda a: np.nanmean(a),
    "np.var of 0 and 2": lambda a: np.var(a),
    "a loop from 0.0": loop,
}
for name, way in WAYS.items():
    given = ones * 2 * (np.arange(ones.size) % 2).astype(np.float32) if "var" in name else ones
    compiled = njit(way)(given)
    print(f"{name}: NumPy {float(way(given)) if way is not loop else '(not run)'}, numba {float(compiled)} as {type(compiled).__name__}")
print("parallel, one thread:", njit(parallel=True)(parallel)(ones), njit(parallel=True)(WAYS["np.sum"])(ones))
PY
PYTHONPATH="$folder/site" python3 -W ignore "$folder/sums.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
numba 0.68.1 NumPy 2.4.6
np.sum: NumPy 33554432.0, numba 16777216.0 as float
np.sum, dtype=float64: NumPy 33554432.0, numba 33554432.0 as float
a.sum(): NumPy 33554432.0, numba 16777216.0 as float
np.sum over an axis: NumPy 33554432.0, numba 16777216.0 as float
np.nansum: NumPy 33554432.0, numba 16777216.0 as float
np.dot: NumPy 33554432.0, numba 33554432.0 as float
np.mean: NumPy 1.0, numba 0.5 as float
np.nanmean: NumPy 1.0, numba 1.0 as float
np.var of 0 and 2: NumPy 1.0, numba 1.0 as float
a loop from 0.0: NumPy (not run), numba 33554432.0 as float
parallel, one thread: 16777216.0 16777216.0
SEEN
echo "as seen before"
