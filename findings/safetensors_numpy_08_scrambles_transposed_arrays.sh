#!/usr/bin/env bash
# safetensors 0.8.0: its save for NumPy writes a transposed array, or one cut out of another, in the order of memory: the numbers are scrambled, without an error.
#
# Weights from JAX or Keras are transposed on their way to torch, and kernel.T is a view. Up to 0.7.0 such arrays were written in their own
# order, and the torch side refuses a tensor that is not contiguous; so one would guess either. 0.8.0 takes the bytes from the first
# element on as they lie, under the shape of the view. Name, shape and dtype are right, so the model loads and answers nonsense; of a
# square matrix one gets the transpose, as if the conversion had forgotten it. The docstring asks for contiguous arrays and nothing checks it.
#
# Seen: safetensors 0.7.0 and 0.8.0 with NumPy 2.4.6, as below. Needs python3 with pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --no-deps --target "$folder/numpy" numpy==2.4.6
cat > "$folder/order.py" <<'PY'
import numpy as np
import safetensors
from safetensors.numpy import load, save

kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
print("safetensors", safetensors.__version__)
arrays = {"kernel": kernel, "kernel.T": kernel.T, "contiguous kernel.T": np.ascontiguousarray(kernel.T), "two columns": kernel[:, :2]}
for name, array in arrays.items():
    loaded = load(save({name: array}))[name]
    print(f"  {name}: {array.tolist()} is loaded as {loaded.tolist()}, equal {np.array_equal(array, loaded)}")
PY
for version in 0.7.0 0.8.0; do
  python3 -m pip install --quiet --no-deps --target "$folder/$version" "safetensors==$version"
  PYTHONPATH="$folder/$version:$folder/numpy" python3 "$folder/order.py" | tee -a "$folder/seen"
done
diff "$folder/seen" - <<'SEEN'
safetensors 0.7.0
  kernel: [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] is loaded as [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], equal True
  kernel.T: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] is loaded as [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], equal True
  contiguous kernel.T: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] is loaded as [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], equal True
  two columns: [[0.0, 1.0], [3.0, 4.0]] is loaded as [[0.0, 1.0], [3.0, 4.0]], equal True
safetensors 0.8.0
  kernel: [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] is loaded as [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], equal True
  kernel.T: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] is loaded as [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], equal False
  contiguous kernel.T: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] is loaded as [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], equal True
  two columns: [[0.0, 1.0], [3.0, 4.0]] is loaded as [[0.0, 1.0], [2.0, 3.0]], equal False
SEEN
echo "as seen before"
