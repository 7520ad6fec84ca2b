#!/usr/bin/env bash
# Intel AMX: half a microsecond after its last product the unit that multiplies tiles falls asleep, and the next products wait a quarter of one.
#
# One would guess that tile products after a pause run as they did before it: a frequency changes within milliseconds, not between two loops, and the tile
# registers keep their numbers. But 24 products (160 ns with their loads and stores) take 420 ns after 600 ns of other work, as much
# as after 10 microseconds, and 160 ns after 400. Tile loads, stores and zeros in between do not help; a single product does, of any kind: int8 keeps
# the unit awake for bfloat16. So a kernel that packs rows or takes exponentials between its products pays for each such pause, or for a product now
# and then that nobody reads (2 to 9 % of attention over short sequences were gained by that).
#
# Seen: Intel Xeon with amx_bf16, family 6, model 167 as its hypervisor shows it; ziglang 0.13.0 (clang 18) compiles. The pause is a chain of multiply-adds
# on vectors; with scalar work the vector units sleep as well, and waking takes longer. Needs such a processor, Linux, python3 with pip, 300 MB; elsewhere it says so and ends.
set -euo pipefail
if ! grep -qm1 amx_bf16 /proc/cpuinfo || ! grep -qm1 amx_int8 /proc/cpuinfo || ! grep -qm1 avx512f /proc/cpuinfo; then
  echo "not a processor with amx_bf16 and amx_int8: nothing to see here"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" ziglang==0.13.0
cat > "$folder/pause.c" <<'C'
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double nanoseconds(void) {
  __asm__ volatile("lfence" ::: "memory");
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e9 * t.tv_sec + t.tv_nsec;
}

static float tiles[8][256] __attribute__((aligned(64)));

#define TILE_LOAD(tile) __asm__ volatile("tileloadd (%0,%1), %%tmm" #tile ::"r"(tiles[tile]), "r"(64L) : "memory");
#define TILE_STORE(tile) __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1)" ::"r"(tiles[tile]), "r"(64L) : "memory");
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::: "memory");
#define PRODUCT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory");

static void products(void) {
  for (int block = 0; block < 2; ++block) {
    TILE_ZERO(0) TILE_ZERO(1) TILE_ZERO(2) TILE_ZERO(3)
    for (int step = 0; step < 3; ++step) {
      TILE_LOAD(4) TILE_LOAD(6) PRODUCT(0, 4, 6) TILE_LOAD(7) PRODUCT(1, 4, 7) TILE_LOAD(5) PRODUCT(2, 5, 6) PRODUCT(3, 5, 7)
    }
    TILE_STORE(0) TILE_STORE(1) TILE_STORE(2) TILE_STORE(3)
  }
}

static int compare(const void* a, const void* b) { return *(const double*)a < *(const double*)b ? -1 : 1; }

// Median time of the products after a pause of so many nanoseconds, in which something is done every 100.
enum Meanwhile { nothing, tile_instructions, int8_product };
static double after(double pause, enum Meanwhile meanwhile) {
  enum { rounds = 4001 };
  static double times[rounds];
  for (int round = 0; round < rounds; ++round) {
    products();
    const double start = nanoseconds();
    for (double next = start + 100, now = start; now < start + pause; now = nanoseconds()) {
      for (int i = 0; i < 4; ++i) __asm__ volatile("vfmadd231ps %%zmm31, %%zmm31, %%zmm0" ::: "memory");
      if (now < next) continue;
      next = now + 100;
      if (meanwhile == tile_instructions) { TILE_LOAD(4) TILE_ZERO(0) TILE_STORE(0) }
      if (meanwhile == int8_product) __asm__ volatile("tdpbssd %%tmm6, %%tmm4, %%tmm0" ::: "memory");
    }
    const double from = nanoseconds();
    products();
    times[round] = nanoseconds() - from;
  }
  qsort(times, rounds, sizeof(double), compare);
  return times[rounds / 2];
}

int main(void) {
  const long request_permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 2;
  struct {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
  } configuration __attribute__((aligned(64))) = {.palette = 1};
  for (int i = 0; i < 8; ++i) configuration.row_bytes[i] = 64, configuration.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(configuration));
  const double none = after(0, nothing), short_pause = after(250, nothing), pause = after(1000, nothing), long_pause = after(10000, nothing);
  const double with_tiles = after(1000, tile_instructions), with_products = after(1000, int8_product);
  __asm__ volatile("tilerelease");
  printf("24 tile products: %.0f ns; after a pause of 250 ns %.0f, of 1000 ns %.0f, of 10000 ns %.0f\n", none, short_pause, pause, long_pause);
  printf("after 1000 ns with tile loads, zeros and stores %.0f, with an int8 product every 100 ns %.0f\n", with_tiles, with_products);
  const double asleep = none + 130;
  return short_pause < asleep && with_products < asleep && pause > asleep && long_pause > asleep && with_tiles > asleep ? 0 : 1;
}
C
PYTHONPATH="$folder/site" python3 -m ziglang cc -O2 -march=sapphirerapids -o "$folder/pause" "$folder/pause.c"
"$folder/pause"
