#!/usr/bin/env bash
# Triton: a field of a constexpr named tuple is a valid alignment hint in 3.8 and 3.9, and a compile error in 3.6 and 3.7.
#
# A kernel that takes its settings as one constexpr NamedTuple compiles up to the first tl.multiple_of(x, SETTINGS.align). One would guess that
# a field of a constexpr is a constexpr, as a plain constexpr argument is; before 3.8 the field arrives as a bare int, which the
# hint refuses. tl.constexpr(SETTINGS.align) compiles with all four. Torch 2.10 and 2.11 bring Triton 3.6, 2.12 and 2.13 bring 3.7, so a kernel
# developed on a newer Triton fails there, on every GPU, at its first call. No GPU is needed to see it.
#
# Seen: 3.6.0 and 3.7.1: plain field "error", wrapped "ok"; 3.8.0 and 3.9.0: "ok" and "ok". Needs python3 with pip, x86-64 Linux.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/hint.py" <<'PY'
import sys
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Settings(NamedTuple):
    align: int


@triton.jit
def plain(x, stride, SETTINGS: tl.constexpr):
    at = tl.multiple_of(tl.arange(0, 16) * stride, SETTINGS.align)
    tl.store(x + at, 1.0)


@triton.jit
def wrapped(x, stride, SETTINGS: tl.constexpr):
    at = tl.multiple_of(tl.arange(0, 16) * stride, tl.constexpr(SETTINGS.align))
    tl.store(x + at, 1.0)


def outcome(kernel):
    signature = {"x": "*fp32", "stride": "i32", "SETTINGS": "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(2,): Settings(8)})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        return "error" if "CompilationError" in type(error).__name__ else f"{type(error).__name__}: {error}"
    return "ok"


print(triton.__version__, outcome(plain), outcome(wrapped))
PY
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
  python3 -m pip install --quiet --no-deps --target "$folder/$version" "triton==$version"
  PYTHONPATH="$folder/$version" TRITON_CACHE_DIR="$folder/cache-$version" python3 "$folder/hint.py" | tee -a "$folder/seen"
  rm -rf "${folder:?}/$version"
done
diff "$folder/seen" - <<'SEEN'
3.6.0 error ok
3.7.1 error ok
3.8.0 ok ok
3.9.0 ok ok
SEEN
echo "as seen before"
