#!/usr/bin/env bash
# scikit-learn: PCA in float32 takes the mean off after squaring once there are ten samples per feature; small components come out as zero, and whitened they are noise times 100000.
#
# PCA is documented to centre its input, and float32 features are common, so one would guess that a mean costs nothing, and that more samples do not hurt. With
# svd_solver="auto", at most 1000 features and ten samples for each, the covariance is X'X less n times the mean's square, in the input's dtype. A mean of
# three, ten times a feature's deviation, takes the smallest of these 64 components; a mean of 30 in two features takes it as well; with 30 in all,
# a dozen components have a variance of exactly zero. whiten=True divides by that: the last columns hold values of 10 to the fifth, and
# whatever is fitted on them (nearest neighbours, linear probes) sees nothing else. With one sample fewer "full" is chosen, which is right. Nothing warns.
# Features centred beforehand, svd_solver="full" or float64 are right.
#
# Seen: scikit-learn 1.9.1 with NumPy 2.4.6, as below. Needs python3.11 or newer with pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
cat > "$folder/components.py" <<'PY'
import sys

import numpy as np
import sklearn
from sklearn.decomposition import PCA

print("scikit-learn", sklearn.__version__)
FEATURES = 64
random = np.random.default_rng(0)
turn = np.linalg.qr(random.normal(size=(FEATURES, FEATURES)))[0]


def features(samples, mean, shifted):
    """Components whose deviations fall from 1 to 0.003, turned, and `mean` added to the first `shifted` features."""
    x = random.normal(size=(samples, FEATURES)) * np.logspace(0, -2.5, FEATURES) @ turn
    x[:, :shifted] += mean
    return x


for samples, mean, shifted in ((6400, 0, 64), (6400, 3, 64), (6400, 30, 2), (639, 30, 64), (640, 30, 64)):
    x = features(samples, mean, shifted)
    exact = PCA(svd_solver="full").fit(x).explained_variance_
    print(f"{samples} samples, a mean of {mean} in {shifted} features of a deviation of {x.std(0).mean():.1f}:")
    inputs = {
        "float32": (x.astype(np.float32), "auto"),
        "float32, full": (x.astype(np.float32), "full"),
        "float32, centred before": ((x - x.mean(0)).astype(np.float32), "auto"),
        "float64": (x, "auto"),
    }
    for name, (given, solver) in inputs.items():
        pca = PCA(whiten=True, svd_solver=solver).fit(given)
        white = pca.transform(given).std(0)
        error = np.abs(np.sqrt(pca.explained_variance_ / exact) - 1)
        print(f"  {name}: solver {pca._fit_svd_solver}, a last component of zero {pca.explained_variance_[-1] == 0}, deviations within 1 % {error.max() < 0.01}, "
              f"whitened columns within 1 % of 1 {np.abs(white - 1).max() < 0.01}, above 10000 {white.max() > 1e4}")
        print(samples, mean, name, (pca.explained_variance_ == 0).sum(), error.max(), white[-3:], file=sys.stderr)
PY
PYTHONPATH="$folder/site" python3 -W error "$folder/components.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
scikit-learn 1.9.1
6400 samples, a mean of 0 in 64 features of a deviation of 0.3:
  float32: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float32, full: solver full, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float32, centred before: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float64: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
6400 samples, a mean of 3 in 64 features of a deviation of 0.3:
  float32: solver covariance_eigh, a last component of zero True, deviations within 1 % False, whitened columns within 1 % of 1 False, above 10000 True
  float32, full: solver full, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float32, centred before: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float64: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
6400 samples, a mean of 30 in 2 features of a deviation of 0.3:
  float32: solver covariance_eigh, a last component of zero True, deviations within 1 % False, whitened columns within 1 % of 1 False, above 10000 True
  float32, full: solver full, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float32, centred before: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float64: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
639 samples, a mean of 30 in 64 features of a deviation of 0.3:
  float32: solver full, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float32, full: solver full, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float32, centred before: solver full, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float64: solver full, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
640 samples, a mean of 30 in 64 features of a deviation of 0.3:
  float32: solver covariance_eigh, a last component of zero True, deviations within 1 % False, whitened columns within 1 % of 1 False, above 10000 True
  float32, full: solver full, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float32, centred before: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
  float64: solver covariance_eigh, a last component of zero False, deviations within 1 % True, whitened columns within 1 % of 1 True, above 10000 False
SEEN
echo "as seen before"
