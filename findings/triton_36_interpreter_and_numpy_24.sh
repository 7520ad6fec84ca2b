#!/usr/bin/env bash
# Triton 3.6.0's interpreter does not work with NumPy 2.4: a loop over a scalar argument ends in a TypeError.
#
# Torch 2.10 and 2.11 bring Triton 3.6.0, and `pip install` puts the newest NumPy beside it; the metadata of neither forbids the pair, so one would
# guess that tests with TRITON_INTERPRET=1 keep working. The interpreter holds a scalar as an array of one element and calls int() on it, which
# NumPy deprecated for arrays with dimensions in 1.25 and refuses since 2.4. With NumPy 2.3.5 it works, and Triton 3.9.0 works with both.
#
# Seen: 3.6.0 with NumPy 2.4.0 "error", with 2.3.5 "ok"; 3.9.0 "ok" and "ok". Needs python3.11 or newer with pip, x86-64 Linux.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/loop.py" <<'PY'
import numpy
import triton
import triton.language as tl


@triton.jit
def count(n):
    total = 0
    for i in range(0, n):
        total += i
    tl.device_assert(total == 10)


def outcome():
    try:
        count[(1,)](5)
    except Exception as error:
        return "error" if "0-dimensional arrays can be converted" in str(error) else repr(error)
    return "ok"


print(triton.__version__, numpy.__version__, outcome())
PY
for version in 3.6.0 3.9.0; do
  python3 -m pip install --quiet --no-deps --target "$folder/triton" "triton==$version"
  for numpy in 2.4.0 2.3.5; do
    python3 -m pip install --quiet --no-deps --target "$folder/numpy" "numpy==$numpy"
    PYTHONPATH="$folder/numpy:$folder/triton" TRITON_INTERPRET=1 python3 "$folder/loop.py" | tee -a "$folder/seen"
    rm -rf "${folder:?}/numpy"
  done
  rm -rf "${folder:?}/triton"
done
diff "$folder/seen" - <<'SEEN'
3.6.0 2.4.0 error
3.6.0 2.3.5 ok
3.9.0 2.4.0 ok
3.9.0 2.3.5 ok
SEEN
echo "as seen before"
