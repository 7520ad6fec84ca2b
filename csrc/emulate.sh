#!/usr/bin/env bash
# Builds the CPU library for a processor that is not at hand and runs the tests of its operators on it, under an emulator:
#
#     csrc/emulate.sh aarch64 [pytest arguments]     NEON     apt install g++-aarch64-linux-gnu qemu-user-static
#     csrc/emulate.sh avx512 [pytest arguments]      AVX-512  pip install bochscpu-python (EMULATOR_PYTHON names the python that
#                                                                 has it, default python; qemu has no AVX-512)
#
# Default tests: the error budgets of every operator, every dtype. tests/emulated_cpu/plugin.py says how calls get there. The usual
# library is not touched.
set -euo pipefail
cd "$(dirname "$0")/.."
processor=${1:?aarch64 or avx512} && shift
out=build/emulated/$processor
rm -rf "$out" && mkdir -p "$out"
build_library() { python setup.py build_native --build-lib "$out" --build-temp "$out"; }
serve=(-std=c++17 -O2 -pthread -Icsrc/include -Icsrc tests/emulated_cpu/serve_calls.cpp -o "$out/serve_calls")
export COMP_KERNELS_BUILD_CUDA=0

case $processor in
  aarch64)
    export CXX=aarch64-linux-gnu-g++
    build_library
    $CXX "${serve[@]}" -L"$out/comp_kernels/lib" -lcomp_kernels_cpu -Wl,-rpath,'$ORIGIN/comp_kernels/lib'
    emulator="qemu-aarch64-static -L /usr/aarch64-linux-gnu $out/serve_calls 2" # at most two threads
    ;;
  avx512)
    export CXX="${CXX:-c++}"
    build_library
    $CXX -static -no-pie "${serve[@]}" "$out"/native-cpu-*/*/*.o # the same objects: bochs.py loads no shared libraries
    emulator="${EMULATOR_PYTHON:-python} tests/emulated_cpu/bochs.py $out/serve_calls"
    if ! ${EMULATOR_PYTHON:-python} -c "import bochscpu; import os; os._exit(0)" 2>/dev/null; then
      # Its wheel wants two functions under the names they have from glibc 2.38 on.
      cat >"$out/older_glibc.c" <<'C'
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
unsigned long long __isoc23_strtoull(const char* text, char** end, int base) { return strtoull(text, end, base); }
int __isoc23_sscanf(const char* text, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int read = vsscanf(text, format, arguments);
  va_end(arguments);
  return read;
}
C
      cc -shared -fPIC -O1 -o "$out/older_glibc.so" "$out/older_glibc.c"
      emulator="env LD_PRELOAD=$PWD/$out/older_glibc.so $emulator"
    fi
    ;;
  *) echo "aarch64 or avx512, got $processor" >&2 && exit 2 ;;
esac

[ $# -gt 0 ] || set -- tests/comp_kernels/rope_attention/test_rope_attention_cpu.py tests/comp_kernels/sinkhorn/test_sinkhorn.py tests/comp_kernels/alignment_loss/test_alignment_loss.py \
  -k "(error_budget or float64 or blocks or strides or bits or definition or range) and not triton"
COMP_KERNELS_EMULATED=$emulator PYTHONPATH=$PWD python -m pytest -p no:cacheprovider -p tests.emulated_cpu.plugin "$@"
