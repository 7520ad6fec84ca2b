#!/usr/bin/env bash
# Intel with AVX512_BF16: dot products of bfloat16 in vectors do half the operations per second of float32 multiply-adds.
#
# vdpbf16ps does 64 operations where vfmadd231ps does 32, so one would guess that it is up to twice as fast, as it is on AMD's Zen 5, and choose
# it wherever the processor's flags show it. On the Xeon below it has a quarter of the multiply-add's rate, so 115 GFLOP/s against 228 in one thread;
# packing two floats into bfloat16 (vcvtne2ps2bf16) has half the rate too. bfloat16 is fast there in AMX tiles alone, 3,280 GFLOP/s.
#
# Seen: Intel Xeon, family 6, model 167 as its hypervisor shows it, with amx_bf16 and avx512_fp16; ziglang 0.13.0 (clang 18) compiles. The instructions are
# independent, twelve in flight. Needs that kind of processor, python3 with pip, 300 MB; elsewhere it says so and ends.
set -euo pipefail
if ! grep -qm1 GenuineIntel /proc/cpuinfo || ! grep -qm1 avx512_bf16 /proc/cpuinfo; then
  echo "not an Intel processor with avx512_bf16: nothing to see here"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" ziglang==0.13.0
cat > "$folder/rate.c" <<'C'
#include <immintrin.h>
#include <stdio.h>
#include <time.h>

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

#define BEST(name, instruction)                                                                                     \
  static double name(void) {                                                                                        \
    double best = 1;                                                                                                \
    for (int round = 0; round < 9; ++round) {                                                                       \
      __m512 sum[12], x = _mm512_set1_ps(0.5f);                                                                     \
      for (int i = 0; i < 12; ++i) sum[i] = x;                                                                      \
      const double start = seconds();                                                                               \
      for (long step = 0; step < 3000000; ++step) {                                                                 \
        _Pragma("unroll") for (int i = 0; i < 12; ++i) __asm__ volatile(instruction " %1, %1, %0" : "+v"(sum[i]) : "v"(x)); \
      }                                                                                                             \
      const double each = (seconds() - start) / 3000000 / 12;                                                       \
      if (each < best) best = each;                                                                                 \
    }                                                                                                               \
    return best;                                                                                                    \
  }
BEST(multiply_add, "vfmadd231ps")
BEST(dot_product, "vdpbf16ps")

int main(void) {
  const double add = multiply_add(), dot = dot_product();
  printf("vfmadd231ps %.0f GFLOP/s, vdpbf16ps %.0f GFLOP/s, time of one against the other %.2f\n", 32e-9 / add, 64e-9 / dot, dot / add);
  return dot / add > 3 ? 0 : 1;
}
C
PYTHONPATH="$folder/site" python3 -m ziglang cc -O2 -march=sapphirerapids -o "$folder/rate" "$folder/rate.c"
"$folder/rate"
