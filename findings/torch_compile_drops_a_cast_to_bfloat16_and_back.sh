#!/usr/bin/env bash
# torch.compile on the CPU: x.to(torch.bfloat16).float() is x, as if it were not written; a split into two bfloat16 loses its second half.
#
# That compiled code rounds less often between two operations is known, and rarely hurts. But two casts that are written out ask for the rounding itself: the
# rest x - x.to(torch.bfloat16).float() of a split, the error that a compensated sum carries along, a weight as it will be stored. So one would
# guess that they stay. They are taken for a detour and left out: the rest is exactly 0, and the two parts together have 8 bits and not 16. Of
# float16 the range goes too: 1e5 does not become infinite. Casts to float8 stay, so code that was tried with those may not work with these. The
# option emulate_precision_casts, off by default, keeps them all.
#
# Seen: torch 2.13.0 on the CPU (x86-64), as below. Needs python3 with pip and headers, g++, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6 setuptools
cat > "$folder/casts.py" <<'PY'
import torch

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
x = torch.randn(1000)


def split(x):
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)


def through_float16(x):
    return x.half().float()


def through_float8(x):
    return x.to(torch.float8_e4m3fn).float()


def error(parts):
    return (sum(part.double() for part in parts) - x.double()).abs().max().item()


kept = torch.compile(split, options={"emulate_precision_casts": True})
for name, function in {"eager": split, "compiled": torch.compile(split), "compiled, emulate_precision_casts": kept}.items():
    parts = function(x)
    print(f"{name}: the second part is 0 everywhere: {not parts[1].any()}, error below 2^-15: {error(parts) < 2**-15}")
print("1e5 through float16:", through_float16(torch.tensor([1e5])).item(), torch.compile(through_float16)(torch.tensor([1e5])).item())
print("float8 compiled as eager:", torch.equal(through_float8(x), torch.compile(through_float8)(x)))
PY
PYTHONPATH="$folder/site" TORCHINDUCTOR_CACHE_DIR="$folder/cache" python3 -W ignore "$folder/casts.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
eager: the second part is 0 everywhere: False, error below 2^-15: True
compiled: the second part is 0 everywhere: True, error below 2^-15: False
compiled, emulate_precision_casts: the second part is 0 everywhere: False, error below 2^-15: True
1e5 through float16: inf 100000.0
float8 compiled as eager: True
SEEN
echo "as seen before"
