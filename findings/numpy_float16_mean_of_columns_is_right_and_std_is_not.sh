#!/usr/bin/env bash
# NumPy: mean(axis=0) of float16 adds in float32, std(axis=0) adds in float16: the deviation of 50000 standard normal numbers is 0.6. scipy's softmax and logsumexp follow.
#
# Features are often kept in float16 and standardised by their mean and deviation. mean is documented to add float16 in float32, and x.sum() of a vector is
# added in float32 and rounded at its end; so one would guess that of std, var and of sums of columns. Where rows are added up (axis=0 of a C-ordered array), each
# row is added to a float16 total, which stops at 2048 times its summand. The deviation gets smaller the more rows there are, and features divided by it
# larger. A constant column of 2 has a deviation of 0.4, since var has a mean of its own, in float16. The same numbers in a vector or in Fortran's
# order are right (until the sum of squares is above 65504: then infinite, with a warning). nanmean is wrong where mean is right, and average with weights
# too. scipy.special.softmax over axis 0 of 4000 equal numbers adds up to 1.95, and logsumexp is 7.62 in place of 8.29. No warning. dtype=np.float32 is right.
#
# Seen: NumPy 2.4.6, scipy 1.17.1, as below. Needs python3.11 or newer with pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" numpy==2.4.6 scipy==1.17.1
cat > "$folder/columns.py" <<'PY'
import sys

import numpy as np
import scipy
from scipy.special import logsumexp, softmax

print("NumPy", np.__version__, "scipy", scipy.__version__)
normal = np.random.default_rng(0).normal(size=(50000, 4)).astype(np.float16)
two = np.full((50000, 4), 2, np.float16)
share = np.ones((50000, 4), np.float16)
WAYS = {
    "std of normal numbers": lambda convert: convert(normal).std(0),
    "std of normal numbers, dtype=float32": lambda convert: convert(normal).std(0, dtype=np.float32),
    "std of normal numbers, a vector": lambda convert: convert(normal[:, 0]).std(),
    "std of normal numbers, Fortran's order": lambda convert: np.asfortranarray(convert(normal)).std(0),
    "mean of twos": lambda convert: convert(two).mean(0),
    "nanmean of twos": lambda convert: np.nanmean(convert(two), axis=0),
    "average of twos, weights of 1": lambda convert: np.average(convert(two), axis=0, weights=convert(share)[:1].repeat(50000, 0)[:, 0]),
    "std of twos": lambda convert: convert(two).std(0),
    "sum of 50000 ones": lambda convert: convert(share).sum(0),
    "sum of 50000 ones, a vector": lambda convert: convert(share[:, 0]).sum(),
    "sum of the softmax of 4000 zeros": lambda convert: softmax(convert(share[:4000]) * 0, axis=0).astype(np.float64).sum(0),
    "logsumexp of 4000 zeros": lambda convert: logsumexp(convert(share[:4000]) * 0, axis=0),
    "logsumexp of 4000 zeros, a vector": lambda convert: logsumexp(convert(share[:4000, 0]) * 0),
}
for name, way in WAYS.items():
    half, exact = (np.asarray(way(convert), np.float64).ravel()[0] for convert in (np.ascontiguousarray, lambda x: x.astype(np.float64)))
    print(f"{name}: within 1 % of that of float64 {bool(abs(half - exact) <= 0.01 * max(exact, 0.1))}, {half:.1g} and {exact:.1g}")
    print(name, half, exact, file=sys.stderr)
PY
PYTHONPATH="$folder/site" python3 -W ignore "$folder/columns.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
NumPy 2.4.6 scipy 1.17.1
std of normal numbers: within 1 % of that of float64 False, 0.6 and 1
std of normal numbers, dtype=float32: within 1 % of that of float64 True, 1 and 1
std of normal numbers, a vector: within 1 % of that of float64 True, 1 and 1
std of normal numbers, Fortran's order: within 1 % of that of float64 True, 1 and 1
mean of twos: within 1 % of that of float64 True, 2 and 2
nanmean of twos: within 1 % of that of float64 False, 0.08 and 2
average of twos, weights of 1: within 1 % of that of float64 False, 0.08 and 2
std of twos: within 1 % of that of float64 False, 0.4 and 0
sum of 50000 ones: within 1 % of that of float64 False, 2e+03 and 5e+04
sum of 50000 ones, a vector: within 1 % of that of float64 True, 5e+04 and 5e+04
sum of the softmax of 4000 zeros: within 1 % of that of float64 False, 2 and 1
logsumexp of 4000 zeros: within 1 % of that of float64 False, 8 and 8
logsumexp of 4000 zeros, a vector: within 1 % of that of float64 True, 8 and 8
SEEN
echo "as seen before"
