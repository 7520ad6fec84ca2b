#!/usr/bin/env bash
# Builds the CPU library with the address and undefined-behaviour sanitizers and runs the tests of its operators on it:
#
#     csrc/sanitize.sh [pytest arguments]         default: the error budgets of every operator, every dtype
#
# It builds every instruction set, and runs baseline, float32 on AMX tiles and the best of this processor. The usual library is put back at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

lib=comp_kernels/lib/libcomp_kernels_cpu.so
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
saved=$(mktemp -d)
for file in "$lib" "${lib%/*}/cpu.sources"; do
  if [ -e "$file" ]; then cp -p "$file" "$saved/"; fi
done
restore() {
  rm -rf build/native-cpu-"$(uname -m)"
  rm -f "$lib" "${lib%/*}/cpu.sources"
  cp -p "$saved"/* "${lib%/*}/" 2>/dev/null || true
  rm -rf "$saved"
}
trap restore EXIT

rm -rf build/native-cpu-"$(uname -m)"
CXXFLAGS="$sanitizers -O1 -g1 -fno-omit-frame-pointer" python setup.py build_native

# The interpreter itself is not instrumented: the runtimes come first, and its own leaks are not ours.
runtimes="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)"
[ $# -gt 0 ] || set -- tests/comp_kernels/rope_attention/test_rope_attention_cpu.py tests/comp_kernels/sinkhorn/test_sinkhorn.py tests/comp_kernels/alignment_loss/test_alignment_loss.py \
  -k "error_budget or float64 or blocks or strides or bits or definition or range"
for isa in baseline amx_bf16x3 ""; do # the second by name, so that it takes short sequences too; the last: no limit
  echo "== ${isa:-the best set}"
  LD_PRELOAD="$runtimes" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    COMP_KERNELS_CPU_ISA=$isa python -m pytest -q -p no:cacheprovider "$@"
done
