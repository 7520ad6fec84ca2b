#!/usr/bin/env bash
# Triton: an integer argument that is 1 is a Python number in the kernel: int8 + 1 wraps where int8 + 2 does not, and -n // 2 rounds down instead of toward zero.
#
# Triton compiles a kernel anew for arguments that are 1, to drop strides. One would guess that this is an optimisation and the value is an int32 like any other: the
# interpreter has it so, and tests with it pass. But 1 arrives as a constant, and constants take part by other rules: they take the type of the tensor (int8 data + n and
# data << n stay in 8 bits, before they are stored as int32; 127 + 1 is -128), and between themselves they follow Python (-1 // 2 is -1 and -1 % 4 is 3; -3 // 2 is -1
# and -3 % 4 is -3, as in C). So one value of one argument gives wrong numbers: a zero point, a shift, the last block of one row. do_not_specialize
# for the argument, or an annotation (n: tl.int32), makes 1 a number like 2.
#
# Seen: 3.6.0, 3.7.1, 3.8.0, 3.9.0, Triton's IR for sm_90 and torch 2.13.0 for the interpreter, as below. Needs python3 with pip, x86-64 Linux, 1.5 GB; no GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/one.py" <<'PY'
import re

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor


@triton.jit
def plain(x, y, n):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i) + n)


@triton.jit
def annotated(x, y, n: tl.int32):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i) + n)


@triton.jit(do_not_specialize=["n"])
def unspecialized(x, y, n):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i) + n)


@triton.jit
def divided(y, n):
    tl.store(y, -n // 2)
    tl.store(y + 1, -n % 4)


class Device:
    """As much of a driver as compiling for a GPU that is not there takes."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compiled(kernel, *arguments):
    return kernel.warmup(*arguments, grid=(1,)).asm["ttir"]


def added_in(kernel, n):
    return re.search(r"arith\.addi .*: tensor<16x(\w+)>", compiled(kernel, MockTensor(torch.int8), MockTensor(torch.int32), n))[1]


def divided_as(n):
    ttir = compiled(divided, MockTensor(torch.int32), n)
    constants = dict(re.findall(r"(%\S+) = arith\.constant (-?\d+) : i32", ttir))
    stored = re.findall(r"tt\.store \S+, (%\w+(?:-\w+)?)", ttir)
    return ", ".join(constants.get(value) or re.search(value + r" = arith\.(\w+)", ttir)[1] for value in stored)


if knobs.runtime.interpret:
    for n in (1, 2, 3):
        y, z = torch.zeros(16, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        plain[(1,)](torch.full((16,), 127, dtype=torch.int8), y, n)
        divided[(1,)](z, n)
        print(f"  interpreter, n = {n}: int8 127 + n = {y[0]}; -n // 2, -n % 4 = {z[0]}, {z[1]}")
else:
    print(triton.__version__)
    triton.runtime.driver.set_active(Device())
    for n in (1, 2, 3):
        kinds = ", ".join(f"{kernel.__name__} in {added_in(kernel, n)}" for kernel in (plain, annotated, unspecialized))
        print(f"  compiled, n = {n}: int8 + n {kinds}; -n // 2, -n % 4: {divided_as(n)}")
PY
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
  python3 -m pip install --quiet --no-deps --target "$folder/$version" "triton==$version"
  for interpret in 0 1; do
    PYTHONPATH="$folder/$version:$folder/site" TRITON_CACHE_DIR="$folder/cache-$version" TRITON_INTERPRET=$interpret python3 "$folder/one.py" | tee -a "$folder/seen"
  done
  rm -rf "${folder:?}/$version"
done
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
  echo "$version"
  cat <<'SEEN'
  compiled, n = 1: int8 + n plain in i8, annotated in i32, unspecialized in i32; -n // 2, -n % 4: -1, 3
  compiled, n = 2: int8 + n plain in i32, annotated in i32, unspecialized in i32; -n // 2, -n % 4: divsi, remsi
  compiled, n = 3: int8 + n plain in i32, annotated in i32, unspecialized in i32; -n // 2, -n % 4: divsi, remsi
  interpreter, n = 1: int8 127 + n = 128; -n // 2, -n % 4 = 0, -1
  interpreter, n = 2: int8 127 + n = 129; -n // 2, -n % 4 = -1, -2
  interpreter, n = 3: int8 127 + n = 130; -n // 2, -n % 4 = -1, -3
SEEN
done | diff "$folder/seen" -
echo "as seen before"
