#!/usr/bin/env bash
# Intel AMX: while tile products run, one of the two AVX-512 multiply-add units stands still for others; integer additions lose nothing.
#
# Tile products are described as the work of an accelerator beside the core, one instruction of 16 cycles, so one would guess that vector code between
# them (a softmax beside the products of attention, say) is free until it needs all the time that they leave. It is for integer additions: 24 vpaddd
# beside every product take no time at all, and so do 12 multiply-adds. But 24 multiply-adds, 12 cycles by themselves, make 16 cycles 24: they
# get one a cycle, not two. What is mostly multiply-adds hides only half as well as its own time says.
#
# Seen: Intel Xeon with amx_bf16, family 6, model 167 as its hypervisor shows it; ziglang 0.13.0 (clang 18) compiles. Products of zeros, four sums in turn,
# all operands in registers. Needs such a processor, Linux, python3 with pip, 300 MB; elsewhere it says so and ends.
set -euo pipefail
if ! grep -qm1 amx_bf16 /proc/cpuinfo || ! grep -qm1 avx512f /proc/cpuinfo; then
  echo "not a processor with amx_bf16: nothing to see here"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" ziglang==0.13.0
cat > "$folder/beside.c" <<'C'
#include <immintrin.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

#define ONE(instruction, to) __asm__ volatile(instruction " %%zmm30, %%zmm31, %%zmm" #to ::: "memory");
#define SIX(i, a, b, c, d, e, f) ONE(i, a) ONE(i, b) ONE(i, c) ONE(i, d) ONE(i, e) ONE(i, f)
#define TWELVE(i) SIX(i, 0, 1, 2, 3, 4, 5) SIX(i, 6, 7, 8, 9, 10, 11)
#define TWENTY_FOUR(i) TWELVE(i) SIX(i, 12, 13, 14, 15, 16, 17) SIX(i, 18, 19, 20, 21, 22, 23)
#define PRODUCT(c) __asm__ volatile("tdpbf16ps %%tmm5, %%tmm4, %%tmm" #c ::: "memory");

// Nanoseconds of four products, each with something beside it: the shortest of many rounds.
#define BEST(name, beside)                                                                      \
  static double name(void) {                                                                    \
    double best = 1;                                                                            \
    for (int round = 0; round < 15; ++round) {                                                  \
      const double start = seconds();                                                           \
      for (int i = 0; i < 200000; ++i) { PRODUCT(0) beside PRODUCT(1) beside PRODUCT(2) beside PRODUCT(3) beside } \
      const double each = (seconds() - start) / 200000;                                         \
      if (each < best) best = each;                                                             \
    }                                                                                           \
    return 1e9 * best;                                                                          \
  }
BEST(alone, )
BEST(with_12_multiply_adds, TWELVE("vfmadd231ps"))
BEST(with_24_multiply_adds, TWENTY_FOUR("vfmadd231ps"))
BEST(with_24_additions, TWENTY_FOUR("vpaddd"))

int main(void) {
  const long request_permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 2;
  struct {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
  } tiles __attribute__((aligned(64))) = {.palette = 1};
  for (int i = 0; i < 8; ++i) tiles.row_bytes[i] = 64, tiles.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(tiles));
  const double products = alone(), twelve = with_12_multiply_adds(), many = with_24_multiply_adds(), integers = with_24_additions();
  __asm__ volatile("tilerelease");
  printf("four tile products %.1f ns; beside each 12 vfmadd231ps: %.2f of that, 24: %.2f, 24 vpaddd: %.2f\n", products,
         twelve / products, many / products, integers / products);
  return twelve / products < 1.15 && integers / products < 1.15 && many / products > 1.35 ? 0 : 1;
}
C
PYTHONPATH="$folder/site" python3 -m ziglang cc -O2 -march=sapphirerapids -o "$folder/beside" "$folder/beside.c"
"$folder/beside"
