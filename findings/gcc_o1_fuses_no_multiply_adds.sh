#!/usr/bin/env bash
# GCC 12: at -O1, -mfma -ffp-contract=fast fuses no product and sum; the rounding of a program changes between -O1 and -O2.
#
# -ffp-contract=fast is GCC's default and is documented to form multiply-adds where the target has them, and -O1 turns most of what is cheap on. So one would
# guess that a test build at -O1 computes what the release at -O3 does. The pass that forms them runs only with
# -fexpensive-optimizations, which comes with -O2. Code whose exactness hangs on one rounding or two (x * y - z where z is x * y
# rounded: exactly 0 unfused, up to half a unit of x * y fused) is then tested in another arithmetic than it ships with.
#
# Seen: gcc 12.2.0-14+deb12u1, x86-64: as below. Looks at assembly only. Needs Debian 12 (apt-get download, dpkg), 120 MB.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
packages=(cpp-12=12.2.0-14+deb12u1 libisl23 libmpc3 libmpfr6 libgmp10 libzstd1 zlib1g)
apt-get -o APT::Sandbox::User=root download -qq "${packages[@]}" > /dev/null
find . -name '*.deb' -exec dpkg -x {} root \;
export LD_LIBRARY_PATH="$PWD/root/usr/lib/x86_64-linux-gnu:$PWD/root/lib/x86_64-linux-gnu"
echo 'float f(float x, float y, float z) { return x * y - z; }' > product.c
instructions() {
  root/usr/lib/gcc/x86_64-linux-gnu/12/cc1 -quiet -mfma -ffp-contract=fast "$@" product.c -o product.s
  echo "$(grep -oE 'vf?n?m(sub|ul|add)[0-9]*ss|vsubss' product.s | tr '\n' ' '): $*"
}
{
  instructions -O1
  instructions -O1 -fexpensive-optimizations
  instructions -O2
} | tee seen
diff seen - <<'SEEN'
vmulss vsubss : -O1
vfmsub132ss : -O1 -fexpensive-optimizations
vfmsub132ss : -O2
SEEN
echo "as seen before"
