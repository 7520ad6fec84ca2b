#!/usr/bin/env bash
# GCC 12: a struct of two 512-bit vectors is copied as four 256-bit moves when tuned for Intel, -mprefer-vector-width=512 or not.
#
# Each vector by itself moves as 64 bytes, so one would guess that a struct of them does too, and that -mprefer-vector-width=512 settles it
# where not: it is the option that says so. But copies of structs follow another one, -mmove-max, whose value comes from -mtune. The price is
# not the second instruction: a 64-byte load of what two 32-byte stores have just written cannot be forwarded from either and waits
# for both. Copying member by member, or -mmove-max=512 -mstore-max=512, moves whole vectors; so does generic tuning.
#
# Seen: gcc 12.2.0-14+deb12u1, x86-64: as below, icelake-server and skylake-avx512 alike. Looks at assembly only: needs no processor with
# AVX-512. Needs Debian 12 (apt-get download, dpkg), 120 MB.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
packages=(cpp-12=12.2.0-14+deb12u1 libgcc-12-dev=12.2.0-14+deb12u1 libisl23 libmpc3 libmpfr6 libgmp10 libzstd1 zlib1g)
apt-get -o APT::Sandbox::User=root download -qq "${packages[@]}" > /dev/null
find . -name '*.deb' -exec dpkg -x {} root \;
export LD_LIBRARY_PATH="$PWD/root/usr/lib/x86_64-linux-gnu:$PWD/root/lib/x86_64-linux-gnu"
lib=root/usr/lib/gcc/x86_64-linux-gnu/12
cat > copy.c <<'C'
typedef float vector __attribute__((vector_size(64)));
struct pair {
  vector a, b;
};

void copy(struct pair *to, const struct pair *from) {
#ifdef BY_MEMBER
  to->a = from->a;
  to->b = from->b;
#else
  *to = *from;
#endif
}
C
# Moves of the function by register: ymm has 256 bits, zmm 512.
moves() {
  "$lib/cc1" -quiet -O3 "$@" copy.c -o copy.s
  echo "$(grep -c '%ymm' copy.s || true) of 256 bits, $(grep -c '%zmm' copy.s || true) of 512: $*"
}
{
  moves -march=icelake-server
  moves -march=icelake-server -mprefer-vector-width=512
  moves -march=skylake-avx512 -mprefer-vector-width=512
  moves -march=icelake-server -DBY_MEMBER
  moves -march=icelake-server -mmove-max=512 -mstore-max=512
  moves -march=x86-64-v4
} | tee seen
diff seen - <<'SEEN'
8 of 256 bits, 0 of 512: -march=icelake-server
8 of 256 bits, 0 of 512: -march=icelake-server -mprefer-vector-width=512
8 of 256 bits, 0 of 512: -march=skylake-avx512 -mprefer-vector-width=512
0 of 256 bits, 4 of 512: -march=icelake-server -DBY_MEMBER
0 of 256 bits, 4 of 512: -march=icelake-server -mmove-max=512 -mstore-max=512
0 of 256 bits, 4 of 512: -march=x86-64-v4
SEEN
echo "as seen before"
