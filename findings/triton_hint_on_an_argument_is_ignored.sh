#!/usr/bin/env bash
# Triton: tl.multiple_of on a scalar argument of a kernel is accepted and does nothing, in 3.6 to 3.9; on a product it works.
#
# A stride that varies is kept out of specialisation (do_not_specialize), or Triton would compile a kernel for each pattern of divisibility by 16.
# One would guess that `stride = tl.multiple_of(stride, 16)` in the kernel then gives the compiler back what it needs for 16-byte loads:
# the function is documented for that, and neither warns nor fails. The hint is an attribute of the operation that made a value, and no operation made
# an argument: it is dropped, and every load is 4 bytes wide. A hint on what is computed from the argument (program_id * stride) counts,
# and so does `stride // 16 * 16`, which says the same in arithmetic. No GPU is needed to see it.
#
# Seen: 3.6.0, 3.7.1, 3.8.0, 3.9.0: "plain 4, argument 4, product 16, arithmetic 16" bytes per load. Needs python3 with pip, x86-64 Linux.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/hint.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def plain(x, y, stride):
    at = tl.program_id(0) * stride + tl.arange(0, 128)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def argument(x, y, stride):
    stride = tl.multiple_of(stride, 16)
    at = tl.program_id(0) * stride + tl.arange(0, 128)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def product(x, y, stride):
    at = tl.multiple_of(tl.program_id(0) * stride, 16) + tl.arange(0, 128)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def arithmetic(x, y, stride):
    stride = stride // 16 * 16
    at = tl.program_id(0) * stride + tl.arange(0, 128)
    tl.store(y + at, tl.load(x + at))


def load_width(kernel):
    """Bytes, for 128 floats of one warp; both pointers are known to be aligned, as a launch would say."""
    signature = {"x": "*fp32", "y": "*fp32", "stride": "i32"}
    aligned = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
    source = ASTSource(fn=kernel, signature=signature, constexprs={}, attrs=aligned)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
    return 16 if "ld.global.v4" in ptx else 4


widths = ", ".join(f"{kernel.__name__} {load_width(kernel)}" for kernel in (plain, argument, product, arithmetic))
print(triton.__version__, widths)
PY
widths_with() {
  python3 -m pip install --quiet --no-deps --target "$folder/$1" "triton==$1"
  PYTHONPATH="$folder/$1" TRITON_CACHE_DIR="$folder/cache-$1" python3 "$folder/hint.py"
  rm -rf "${folder:?}/$1"
}
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do widths_with "$version"; done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
3.6.0 plain 4, argument 4, product 16, arithmetic 16
3.7.1 plain 4, argument 4, product 16, arithmetic 16
3.8.0 plain 4, argument 4, product 16, arithmetic 16
3.9.0 plain 4, argument 4, product 16, arithmetic 16
SEEN
echo "as seen before"
