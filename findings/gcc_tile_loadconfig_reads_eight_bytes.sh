#!/usr/bin/env bash
# GCC 12: with optimisation, _tile_loadconfig loads an AMX configuration whose 64 bytes were not all written.
#
# The intrinsic takes a pointer to 64 bytes. One would guess that filling a struct and passing its address is enough, as it is for every vector
# intrinsic. In GCC it is inline assembly whose operand is the pointed-to memory as one pointer, eight bytes; what the struct gets beyond them is
# dead to the compiler, and from -O1 on the stores are dropped: the row counts (bytes 48 to 63) stay what the stack held. _tile_storeconfig has
# the same operand. A memory clobber before the call, or the instruction with the whole struct as its operand, keeps the stores.
#
# Seen: gcc 12.2.0-14+deb12u1: a function that stores its argument as a row count and loads the configuration never uses the argument at -O2, and does
# at -O0 or after a clobber. Looks at assembly only: needs no processor with AMX. Needs Debian 12 (apt-get download, dpkg), x86-64, 120 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
version=12.2.0-14+deb12u1
apt-get -o APT::Sandbox::User=root download -qq "cpp-12=$version" "libgcc-12-dev=$version" libisl23 libmpc3 libmpfr6 libgmp10 libzstd1 zlib1g > /dev/null
for package in ./*.deb; do dpkg -x "$package" root; done
lib=root/usr/lib/gcc/x86_64-linux-gnu/12
export LD_LIBRARY_PATH="$PWD/root/usr/lib/x86_64-linux-gnu:$PWD/root/lib/x86_64-linux-gnu"
cat > configure.c <<'C'
#include <amxtileintrin.h>

struct configuration {
  unsigned char palette, start_row, reserved[14];
  unsigned short row_bytes[16];
  unsigned char rows[16];
};

void configure(unsigned char rows) {
  struct configuration c = {0};
  c.palette = 1;
  c.row_bytes[0] = 64;
  c.rows[0] = rows;
#ifdef CLOBBER
  __asm__ volatile("" ::"r"(&c) : "memory");
#endif
  _tile_loadconfig(&c);
}
C
# How many instructions of the function read its argument, which comes in edi.
uses() {
  "$lib/cc1" -quiet -mamx-tile -isystem "$lib/include" "$@" -D_IMMINTRIN_H_INCLUDED configure.c -o configure.s
  grep -cE '%(edi|dil|rdi)' configure.s || true
}
at_o2=$(uses -O2) at_o0=$(uses -O0) clobbered=$(uses -O2 -DCLOBBER)
echo "instructions that use the row count: -O0 $at_o0, -O2 $at_o2, -O2 after a memory clobber $clobbered"
[ "$at_o2" = 0 ] && [ "$at_o0" -gt 0 ] && [ "$clobbered" -gt 0 ]
