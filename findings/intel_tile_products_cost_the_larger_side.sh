#!/usr/bin/env bash
# Intel AMX: a tile product takes as many cycles as the larger of the rows of its two operands, at least 9; a small one beside a large one saves nothing.
#
# Tiles are given their sizes so that the ends of a matrix need no filling up, and one would guess that less is then to be done: one row of A (a vector
# times a matrix) or four pairs of depth instead of sixteen a fraction of the 16 cycles. 1 x 16 takes 16 as well, and so does 16 x 1. Only where both are
# small is a product shorter: 12 x 12 takes 12, 8 x 8 about 9, and so does everything below. The number of columns never matters. So 8 channels that are left
# over after whole steps of 32 cost a whole step, filled up with zeros or not.
#
# Seen: Intel Xeon with amx_bf16, family 6, model 167 as its hypervisor shows it; ziglang 0.13.0 (clang 18) compiles. Products of zeros, loaded once,
# four sums in turn (a B that was never loaded counts as none: then the rows of A alone decide). Needs such a processor, Linux, python3 with pip, 300 MB; elsewhere it says so and ends.
set -euo pipefail
if ! grep -qm1 amx_bf16 /proc/cpuinfo; then
  echo "not a processor with amx_bf16: nothing to see here"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" ziglang==0.13.0
cat > "$folder/sizes.c" <<'C'
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double nanoseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e9 * t.tv_sec + t.tv_nsec;
}

static float numbers[256] __attribute__((aligned(64)));

// Nanoseconds of a product C [rows, columns] += A [rows, 2 depth] B [2 depth, columns] of bfloat16.
static double once(int rows, int depth, int columns) {
  struct {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
  } tiles __attribute__((aligned(64))) = {.palette = 1};
  for (int i = 0; i < 4; ++i) tiles.row_bytes[i] = 4 * columns, tiles.rows[i] = rows;
  for (int i = 4; i < 6; ++i) tiles.row_bytes[i] = 4 * depth, tiles.rows[i] = rows;
  for (int i = 6; i < 8; ++i) tiles.row_bytes[i] = 4 * columns, tiles.rows[i] = depth;
  __asm__ volatile("ldtilecfg %0" ::"m"(tiles));
  __asm__ volatile("tileloadd (%0,%1), %%tmm4; tileloadd (%0,%1), %%tmm5; tileloadd (%0,%1), %%tmm6; tileloadd (%0,%1), %%tmm7" ::"r"(numbers),
                   "r"(64L)
                   : "memory");
  const double start = nanoseconds();
  for (int i = 0; i < 50000; ++i) {
    __asm__ volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0; tdpbf16ps %tmm7, %tmm4, %tmm1; tdpbf16ps %tmm6, %tmm5, %tmm2; tdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  const double each = (nanoseconds() - start) / 200000;
  __asm__ volatile("tilerelease");
  return each;
}

int main(void) {
  const long request_permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 2;
  const int sizes[][3] = {{16, 16, 16}, {1, 16, 16}, {16, 1, 16}, {16, 16, 1}, {12, 12, 16}, {4, 12, 16}, {8, 8, 16}, {1, 1, 1}};
  double best[8];
  for (int round = 0; round < 40; ++round) {  // all sizes in turns, the shortest of each
    for (int i = 0; i < 8; ++i) {
      const double time = once(sizes[i][0], sizes[i][1], sizes[i][2]);
      if (round == 0 || time < best[i]) best[i] = time;
    }
  }
  const double whole = best[0], one_row = best[1] / whole, one_deep = best[2] / whole, narrow = best[3] / whole;
  const double twelve = best[4] / whole, flat = best[5] / whole, eight = best[6] / whole, least = best[7] / whole;
  printf("16 rows x 16 pairs x 16 columns: %.2f ns; parts of that: 1 x 16 x 16 %.2f, 16 x 1 x 16 %.2f, 16 x 16 x 1 %.2f\n", whole, one_row,
         one_deep, narrow);
  printf("12 x 12 x 16 %.2f, 4 x 12 x 16 %.2f, 8 x 8 x 16 %.2f, 1 x 1 x 1 %.2f\n", twelve, flat, eight, least);
  const int full = one_row > 0.9 && one_deep > 0.9 && narrow > 0.9;
  const int larger = twelve > 0.7 && twelve < 0.85 && flat > 0.7 && flat < 0.85 && eight > 0.5 && eight < 0.65 && least > 0.5;
  return full && larger ? 0 : 1;
}
C
PYTHONPATH="$folder/site" python3 -m ziglang cc -O2 -march=sapphirerapids -o "$folder/sizes" "$folder/sizes.c"
"$folder/sizes"
