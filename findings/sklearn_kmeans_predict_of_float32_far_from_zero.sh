#!/usr/bin/env bash
# scikit-learn: KMeans fits float32 points far from zero well, and then predict gives the very points of the fit to other clusters.
#
# k.predict(X) of the X it was fitted on is k.labels_, one would guess, and scikit-learn has a test for that. fit takes the mean off first and adds it to the
# centres at the end; predict and score do not, and compare |c|^2 - 2 x.c in float32. Coordinates of a map in metres (five million north), positions in a large
# mosaic or times in seconds are that far out: float32 holds them to half a metre, the clusters are 300 m apart, labels_ and cluster_centers_ are right, and predict
# is wrong for four points of five, so new points go to wrong clusters as well. transform (distances) and its argmin are right, in the same object. MiniBatchKMeans, which
# takes no mean off, is wrong from the fit on. No warning. Points in float64, or moved near to zero, are right.
#
# Seen: scikit-learn 1.9.1 with NumPy 2.4.6, as below. Needs python3.11 or newer with pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
cat > "$folder/clusters.py" <<'PY'
import sys

import numpy as np
import sklearn
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score

print("scikit-learn", sklearn.__version__)
random = np.random.default_rng(0)
centres = np.array([[0, 0], [300, 0], [0, 300], [300, 300], [150, 600]])
truth = random.integers(5, size=2000)
metres = centres[truth] + random.normal(size=(2000, 2)) * 20


def said(share):
    return "all" if share == 1 else "most" if share > 0.9 else "some" if share > 0.6 else "few"


for start in ((0, 0), (500000, 0), (500000, 5000000)):
    for dtype in (np.float32, np.float64):
        x = (metres + start).astype(dtype)
        for model in (KMeans, MiniBatchKMeans):
            k = model(5, n_init=10, random_state=0).fit(x)
            found = adjusted_rand_score(truth, k.labels_)
            nearest = ((x[:, None].astype(float) - k.cluster_centers_) ** 2).sum(2).argmin(1)
            predicted, from_distances = (k.predict(x) == nearest).mean(), (k.transform(x).argmin(1) == nearest).mean()
            print(f"{model.__name__}, {dtype.__name__} from {start} on: clusters found {found > 0.99}; given to the nearest of its centres: "
                  f"{said((k.labels_ == nearest).mean())} by labels_, {said(predicted)} by predict, {said(from_distances)} by transform")
            print(model.__name__, dtype.__name__, start, found, predicted, from_distances, k.inertia_, k.score(x), file=sys.stderr)
PY
PYTHONPATH="$folder/site" python3 -W error "$folder/clusters.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
scikit-learn 1.9.1
KMeans, float32 from (0, 0) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
MiniBatchKMeans, float32 from (0, 0) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
KMeans, float64 from (0, 0) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
MiniBatchKMeans, float64 from (0, 0) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
KMeans, float32 from (500000, 0) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
MiniBatchKMeans, float32 from (500000, 0) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
KMeans, float64 from (500000, 0) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
MiniBatchKMeans, float64 from (500000, 0) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
KMeans, float32 from (500000, 5000000) on: clusters found True; given to the nearest of its centres: all by labels_, few by predict, all by transform
MiniBatchKMeans, float32 from (500000, 5000000) on: clusters found False; given to the nearest of its centres: few by labels_, few by predict, all by transform
KMeans, float64 from (500000, 5000000) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
MiniBatchKMeans, float64 from (500000, 5000000) on: clusters found True; given to the nearest of its centres: all by labels_, all by predict, all by transform
SEEN
echo "as seen before"
