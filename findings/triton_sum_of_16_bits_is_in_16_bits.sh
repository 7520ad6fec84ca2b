#!/usr/bin/env bash
# Triton: tl.sum adds float16 and bfloat16 in 16 bits, though its documentation says "at least tl.float32" from 3.6 to 3.8.
#
# tl.dot adds 16-bit products in float32, torch.sum does, and integers of 8 bits are widened; so one would guess, with the docstring, that a sum over a
# bfloat16 tile is rounded once, at its end. Each level of the tree rounds to 8 bits instead (float16: to 11, and it ends at 65504), and
# a loop that adds such sums to a float32 looks careful and is not. tl.cumsum of bfloat16 is widened beside it, up to 3.8; 3.9 widens
# neither and says so. x.to(tl.float32) before the sum, or dtype=tl.float32, helps in all of them. No GPU is needed to see it.
#
# Seen: 3.6.0, 3.7.1, 3.8.0, 3.9.0, the type of the addition in Triton's IR, as below. Needs python3 with pip, x86-64 Linux.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/sums.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def total(x, y):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, 256))))


@triton.jit
def asked(x, y):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, 256)), dtype=tl.float32))


@triton.jit
def running(x, y):
    tl.store(y + tl.arange(0, 256), tl.cumsum(tl.load(x + tl.arange(0, 256))))


def added_in(kernel, dtype):
    source = ASTSource(fn=kernel, signature={"x": f"*{dtype}", "y": "*fp32"}, constexprs={})
    ttir = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    return re.search(r"arith\.add[if] %arg2, %arg3 : (\w+)", ttir)[1]


print(triton.__version__, "says at least float32:", "at least :code:`tl.float32`" in tl.sum.__doc__)
for kernel in (total, asked, running):
    types = "i8 fp16 bf16".split() if kernel is not asked else ["fp16", "bf16"]
    print(f"  {kernel.__name__}:", ", ".join(f"{dtype} in {added_in(kernel, dtype)}" for dtype in types))
PY
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
  python3 -m pip install --quiet --no-deps --target "$folder/$version" "triton==$version"
  PYTHONPATH="$folder/$version" TRITON_CACHE_DIR="$folder/cache-$version" python3 "$folder/sums.py" | tee -a "$folder/seen"
  rm -rf "${folder:?}/$version"
done
diff "$folder/seen" - <<'SEEN'
3.6.0 says at least float32: True
  total: i8 in i32, fp16 in f16, bf16 in bf16
  asked: fp16 in f32, bf16 in f32
  running: i8 in i32, fp16 in f16, bf16 in f32
3.7.1 says at least float32: True
  total: i8 in i32, fp16 in f16, bf16 in bf16
  asked: fp16 in f32, bf16 in f32
  running: i8 in i32, fp16 in f16, bf16 in f32
3.8.0 says at least float32: True
  total: i8 in i32, fp16 in f16, bf16 in bf16
  asked: fp16 in f32, bf16 in f32
  running: i8 in i32, fp16 in f16, bf16 in f32
3.9.0 says at least float32: False
  total: i8 in i32, fp16 in f16, bf16 in bf16
  asked: fp16 in f32, bf16 in f32
  running: i8 in i32, fp16 in f16, bf16 in bf16
SEEN
echo "as seen before"
