#!/usr/bin/env bash
# Triton's interpreter: a cast from float32 to bfloat16 cuts the low bits off; float8 wraps around above its range and makes numbers of NaN and infinity.
#
# The documentation says that TRITON_INTERPRET=1 cannot calculate in bfloat16, and to cast to float32 for it. So one would guess that a kernel which loads bfloat16,
# calculates in float32 and stores bfloat16 gives there what it gives compiled, where the cast is cvt.rn (to nearest). The cast back rounds toward
# zero, and naming fp_downcast_rounding="rtne" does not change it: an error up to twice as large and always of one sign, so a mean over many values, or weights that are
# updated in bfloat16, drift. Tests compared with torch get a tolerance that hides a kernel's own errors. A subnormal comes out ten times too large.
# To float8e4nv (e4m3), where the GPU stops at 448, 500 becomes 256, infinity 256 and NaN 384. float16 goes through NumPy and is right.
#
# Seen: 3.6.0, 3.7.1, 3.8.0, 3.9.0 with torch 2.13.0, as below; Triton's issue 8322 has float8e5. Needs python3 with pip, x86-64 Linux, 1.5 GB; no GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/casts.py" <<'PY'
import re

import torch
import triton
import triton.language as tl
from triton import knobs


@triton.jit
def cast(x, y, n: tl.constexpr):
    tl.store(y + tl.arange(0, n), tl.load(x + tl.arange(0, n)).to(y.dtype.element_ty))


@triton.jit
def cast_to_nearest(x, y, n: tl.constexpr):
    tl.store(y + tl.arange(0, n), tl.load(x + tl.arange(0, n)).to(tl.bfloat16, fp_downcast_rounding="rtne"))


def run(kernel, x, dtype):
    y = torch.zeros(len(x), dtype=dtype)
    kernel[(1,)](x, y, len(x))
    return y.float()


def show(values):
    return " ".join(f"{value:.8g}" for value in values.tolist())


if knobs.runtime.interpret:
    few = torch.tensor([1.0117188, 1.999, -3.999, 1e-40])
    print("  torch                ", show(few.bfloat16().float()))
    print("  interpreter          ", show(run(cast, few, torch.bfloat16)))
    print("  interpreter, nearest ", show(run(cast_to_nearest, few, torch.bfloat16)))
    many = torch.rand(65536, generator=torch.Generator().manual_seed(0)) + 1
    print("  mean error: torch", f"{(many.bfloat16().float() - many).mean():.4f}, interpreter {(run(cast, many, torch.bfloat16) - many).mean():.4f}")
    large = torch.tensor([448, 500, float("inf"), float("nan")])
    print("  float8e4nv of 448, 500, inf, nan:", show(run(cast, large, torch.float8_e4m3fn)), "float16:", show(run(cast, large, torch.float16)))
else:
    print(triton.__version__)
    for kernel, dtype in ((cast, "bf16"), (cast_to_nearest, "bf16"), (cast, "fp8e4nv")):
        source = triton.compiler.ASTSource(fn=kernel, signature={"x": "*fp32", "y": f"*{dtype}", "n": "constexpr"}, constexprs={(2,): 128})
        ptx = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32)).asm["ptx"]
        print(f"  compiled, {kernel.__name__} to {dtype}:", *sorted(set(re.findall(r"cvt\.r\S+", ptx))))
PY
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
  python3 -m pip install --quiet --no-deps --target "$folder/$version" "triton==$version"
  for interpret in 0 1; do
    PYTHONPATH="$folder/$version:$folder/site" TRITON_CACHE_DIR="$folder/cache-$version" TRITON_INTERPRET=$interpret python3 "$folder/casts.py" | tee -a "$folder/seen"
  done
  rm -rf "${folder:?}/$version"
done
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
  echo "$version"
  cat <<'SEEN'
  compiled, cast to bf16: cvt.rn.bf16.f32
  compiled, cast_to_nearest to bf16: cvt.rn.bf16.f32
  compiled, cast to fp8e4nv: cvt.rn.satfinite.e4m3x2.f32
  torch                 1.015625 2 -4 9.1835496e-41
  interpreter           1.0078125 1.9921875 -3.984375 1.0101905e-39
  interpreter, nearest  1.0078125 1.9921875 -3.984375 1.0101905e-39
  mean error: torch 0.0000, interpreter -0.0039
  float8e4nv of 448, 500, inf, nan: 448 256 256 384 float16: 448 500 inf nan
SEEN
done | diff "$folder/seen" -
echo "as seen before"
